"""Gradients out of TensorFlow's graph, over the ranks, and back: the one line in which `model.fit` talks.

Every meeting of the ranks begins with a roll call of a few numbers. A rank that has ended its training,
or brings an array of another length, is found there; without it, the others would wait for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf

from tf_dist.comm.base import Comm
from tf_dist.errors import LaunchError, hide
from tf_dist.parallel.flat import aligned_empty

# What a roll call sums over the ranks.
ENDED, NOT_FINITE, LENGTH, LENGTH_SQUARED = range(4)


class Reduction:
    """The mean over all ranks, as an operation of a TensorFlow graph or called eagerly.

    Args:
        comm: all ranks.

    Attributes:
        failure: the error raised inside the graph, which TensorFlow turns into one of its own.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def mean(self, gradients: Sequence[Any]) -> list[Any]:
        """Gradients averaged over the ranks, each dense and of its own dtype; None stays None.

        They cross as one flat array, of float32 (float64 where a gradient is that).
        """
        dense = [tf.convert_to_tensor(gradient) for gradient in gradients if gradient is not None]
        if not dense:
            return list(gradients)
        wide = tf.float64 if any(tensor.dtype == tf.float64 for tensor in dense) else tf.float32
        flat = tf.concat([tf.reshape(tf.cast(tensor, wide), (-1,)) for tensor in dense], axis=0)
        # Stateful, so TensorFlow keeps such operations in the order in which they were written.
        mean = tf.ensure_shape(tf.numpy_function(self._mean_flat, [flat], wide, stateful=True), flat.shape)
        parts = tf.split(mean, [_size(tensor) for tensor in dense], num=len(dense))
        back = (tf.cast(tf.reshape(part, tf.shape(t)), t.dtype) for part, t in zip(parts, dense, strict=True))
        return [None if gradient is None else next(back) for gradient in gradients]

    def all_finite(self, finite: Any) -> Any:
        """Whether a boolean tensor, (), is true on every rank."""
        return tf.ensure_shape(tf.numpy_function(self._all_finite, [finite], tf.bool, stateful=True), ())

    def end(self) -> None:
        """Say that this rank's training, or its epoch, has ended; a collective.

        Raises:
            LaunchError: other ranks go on.
        """
        sums = self._roll_call(0, ended=True)
        if sums[ENDED] != self.comm.size:
            self._fail(self._unequal_steps(sums))

    def _mean_flat(self, flat_P: np.ndarray) -> np.ndarray:
        self.comm.record.next_step()
        self._step(flat_P.size)
        # A new buffer each time: TensorFlow keeps what is returned, and variables may move into it.
        buffer_P = aligned_empty(flat_P.size, flat_P.dtype)
        np.copyto(buffer_P, flat_P)
        self.comm.allreduce(buffer_P)
        buffer_P /= self.comm.size
        return buffer_P

    def _all_finite(self, finite: np.ndarray) -> np.ndarray:
        return np.asarray(self._step(0, not_finite=not finite)[NOT_FINITE] == 0)

    def _step(self, length: int, not_finite: bool = False) -> np.ndarray:
        """A roll call that everyone must answer from inside a training step."""
        sums = self._roll_call(length, not_finite=not_finite)
        if sums[ENDED]:
            self._fail(self._unequal_steps(sums))
        if sums[LENGTH_SQUARED] * self.comm.size != sums[LENGTH] ** 2:
            self._fail(
                f"the ranks bring gradients of different lengths (here {length} numbers): their models, or "
                "the variables that get a gradient in this step, are not the same"
            )
        return sums

    def _unequal_steps(self, sums: np.ndarray) -> str:
        """The same words on the ranks that have ended and on those that go on: the job has one voice."""
        return (
            f"{int(sums[ENDED])} of {self.comm.size} ranks have ended their training, or its epoch, while "
            "the others go on: the ranks took different numbers of steps. Give all of them a dataset of "
            "tf_dist.shard(data, comm), and stop early on all ranks alike"
        )

    def _roll_call(self, length: int, *, ended: bool = False, not_finite: bool = False) -> np.ndarray:
        sums = np.array([ended, not_finite, length, float(length) ** 2])
        self.comm.allreduce(sums)
        return sums

    def _fail(self, message: str) -> NoReturn:
        raise hide(LaunchError(message))


def _size(tensor: Any) -> Any:
    size = tensor.shape.num_elements()
    return tf.size(tensor) if size is None else size
