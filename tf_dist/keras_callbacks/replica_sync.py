"""Synchronize and compare replicated state: weights, optimizer, learning rates."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import LaunchError
from tf_dist.keras_callbacks.digests import splits

_local = threading.local()


def state_variables(model: keras.Model, with_optimizer: bool = True) -> list[Any]:
    """The weights of a model, and its optimizer's variables, in one order on all ranks.

    Seed generators are not among them: ranks may draw their own dropout.
    """
    variables = list(model.weights)
    optimizer = getattr(model, "optimizer", None)
    if with_optimizer and optimizer is not None:
        variables += optimizer.variables
    return list({id(variable): variable for variable in variables}.values())


def broadcast_state(model: keras.Model, comm: Comm) -> None:
    """Broadcast the weights and the optimizer's variables of rank 0; a collective.

    Raises:
        LaunchError: on every rank: the ranks have different models or optimizers.
    """
    optimizer = getattr(model, "optimizer", None)
    complete = all(layer.built for layer in model._flatten_layers())  # else the first step creates weights
    if optimizer is not None and not optimizer.built and complete:
        with deferred_starts():
            optimizer.build(model.trainable_variables)  # rank 0 may have built it while restoring it
    variables = state_variables(model)
    layout = repr([(tuple(variable.shape), str(variable.dtype)) for variable in variables]).encode()
    layouts = comm.allgather_obj(zlib.crc32(layout))
    if len(set(layouts)) > 1:
        raise LaunchError("the ranks have models or optimizers of different shapes: build all alike")
    broadcast(variables, comm)


def broadcast(variables: Sequence[Any], comm: Comm) -> bool:
    """Broadcast rank 0's values, of any dtypes, in one message; a collective.

    Returns:
        Whether a value of this rank has changed.
    """
    arrays = [np.asarray(variable.numpy()) for variable in variables]
    mine = [np.frombuffer(array.tobytes(), np.uint8) for array in arrays]
    raw = np.concatenate(mine or [np.empty(0, np.uint8)])
    before = raw.copy()
    comm.broadcast(raw)
    ends = np.cumsum([array.nbytes for array in arrays])
    for variable, array, part in zip(variables, arrays, np.split(raw, ends), strict=False):
        variable.assign(part.copy().view(array.dtype).reshape(array.shape))
    return not np.array_equal(before, raw)


def check_same(model: keras.Model, comm: Comm, when: str, with_optimizer: bool = True) -> None:
    """Compare the state of all ranks, bit for bit; a collective.

    Args:
        model: this rank's.
        comm: all ranks.
        when: for the message, such as "after batch 40".
        with_optimizer: whether the optimizer's variables must be equal, too.

    Raises:
        LaunchError: on every rank, with the same message: the ranks and the first variable that differ.
    """
    difference = first_difference(state_variables(model, with_optimizer), comm)
    if difference:
        raise LaunchError(
            f"{when} {difference}: they stopped training one model. "
            "Are the gradients reduced on every step, and are all nodes of one kind?"
        )


def first_difference(variables: Sequence[Any], comm: Comm) -> str:
    """The ranks and the first variable that differ; or empty. A collective, in one order on all ranks."""
    found = splits(variables, comm)
    if not found:
        return ""
    name = comm.broadcast_obj(variables[found[0].place].path)
    return f"{found[0].who} in variable {name!r}"


def adjustable(model: keras.Model) -> list[Any]:
    """The optimizers of a model whose learning rate can be set; not those that follow a schedule."""
    optimizer: Any = getattr(model, "optimizer", None)
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    several = getattr(optimizer, "optimizers", [optimizer])
    return [one for one in several if isinstance(getattr(one, "_learning_rate", None), keras.Variable)]


@contextmanager
def deferred_starts() -> Iterator[None]:
    """Make optimizers that are built here not broadcast their state: the caller does so for all of them."""
    before, _local.deferred = starts_are_deferred(), True
    try:
        yield
    finally:
        _local.deferred = before


def starts_are_deferred() -> bool:
    """Whether this thread is inside `deferred_starts`."""
    return bool(getattr(_local, "deferred", False))


def is_distributed(optimizer: Any) -> bool:
    """Whether an optimizer, or one inside it, reduces gradients over ranks (`tf_dist.distribute`)."""
    while optimizer is not None and not isinstance(getattr(optimizer, "comm", None), Comm):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer is not None
