"""Self-test of the Keras patches: a one-weight model proves, once per process, that Keras calls them.

Horovod's optimizer shows what happens otherwise: under Keras 3 its hook is never called, and training
runs unsynchronised without an error.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError
from tf_dist.keras_fit.distributed_optimizer import made_distributed
from tf_dist.keras_fit.fit_session import begin_session
from tf_dist.keras_fit.gradient_reduction import HEADER, PAYLOAD
from tf_dist.keras_fit.step_scope import Law
from tf_dist.keras_fit.train_function import NOT_CALLED

# What the other rank of the self-test adds to every gradient.
OF_THE_OTHER = 6.0
_passed: set[str] = set()


class _TwoRanks(SerialComm):
    """A rank 0 of two, whose partner is made up."""

    size = 2

    def _allreduce(self, array: np.ndarray) -> None:
        if array.size == HEADER + PAYLOAD:  # a roll call, which the other answers as we do
            array *= 2
        else:
            array += OF_THE_OTHER

    def _allgather_bytes(self, raw: bytes) -> list[bytes]:
        return [raw, raw]


class _OneWeight(keras.Model):
    """y = w x, with w = 0: the gradient of (y - 1)^2 / 2 at x = 1 is -1."""

    def __init__(self) -> None:
        super().__init__(name="tf_dist_self_test")
        self.w = self.add_weight(shape=(1,), initializer="zeros", name="w")
        self.built = True

    def call(self, x: Any) -> Any:
        return x * self.w


def run() -> None:
    """Fit a model of one weight for one step and look where it goes.

    Raises:
        LaunchError: it did not go where the mean over the ranks leads.
    """
    if keras.__version__ in _passed:
        return
    optimizer = made_distributed(keras.optimizers.SGD(1.0, name="tf_dist_self_test"), _TwoRanks())
    model = _OneWeight()
    model.compile(optimizer, loss=_half_square, jit_compile=False)
    session = begin_session(model, optimizer.comm)
    session.law, session.law_is_given = Law(), True
    one = np.ones((1, 1), np.float32)
    try:
        model.fit(one, one, verbose=0, shuffle=False, callbacks=_plain_list(model))
    except LaunchError as error:
        raise LaunchError(f"self-test of distribute(): {error}") from None
    moved, expected = float(model.w.numpy()[0]), -(OF_THE_OTHER - 1.0) / 2
    if abs(moved - expected) > 1e-5:
        raise LaunchError(
            f"self-test of distribute(): a step of model.fit led to {moved:g}, not {expected:g}. {NOT_CALLED}"
        )
    _passed.add(keras.__version__)


def _plain_list(model: keras.Model) -> keras.callbacks.CallbackList:
    """Keras's own list of callbacks: ours would agree with ranks that are not there."""
    callbacks = keras.callbacks.CallbackList(add_history=True)  # made without a model, so not ours
    callbacks.set_model(model)
    return callbacks


def _half_square(y: Any, prediction: Any) -> Any:
    return keras.ops.square(y - prediction) / 2
