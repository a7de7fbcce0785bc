"""What all ranks must have in common: weights, optimizer, learning rates. Made equal, and checked."""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any

import keras
import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.errors import LaunchError


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
    """Give every rank the weights and the optimizer's variables of rank 0; a collective.

    Raises:
        LaunchError: the ranks have different models or optimizers.
    """
    optimizer = getattr(model, "optimizer", None)
    complete = all(layer.built for layer in model._flatten_layers())  # else the first step makes weights
    if optimizer is not None and not optimizer.built and complete:
        optimizer.build(model.trainable_variables)  # rank 0 may have built it to restore it
    variables = state_variables(model)
    arrays = [np.ascontiguousarray(variable.value) for variable in variables]
    layouts = comm.allgather_obj([zlib.crc32(repr([(a.shape, str(a.dtype)) for a in arrays]).encode())])
    if layouts != [layouts[0]] * comm.size:
        raise LaunchError("the ranks have models or optimizers of different shapes: build all alike")
    state = np.concatenate([_bytes(array) for array in arrays])
    comm.broadcast(state)
    if comm.rank == 0:
        return
    ends = np.cumsum([array.nbytes for array in arrays])
    for variable, array, raw in zip(variables, arrays, np.split(state, ends[:-1]), strict=True):
        variable.assign(raw.copy().view(array.dtype).reshape(variable.shape))


def digests(model: keras.Model, with_optimizer: bool = True) -> list[int]:
    """CRC-32 of the bytes of each of `state_variables`."""
    return [
        zlib.crc32(_bytes(np.ascontiguousarray(variable.value)).data)
        for variable in state_variables(model, with_optimizer)
    ]


def check_same(model: keras.Model, comm: Comm, when: str, with_optimizer: bool = True) -> None:
    """Compare the state of all ranks, bit for bit; a collective.

    Args:
        model: this rank's.
        comm: all ranks.
        when: for the message, such as "after batch 40".
        with_optimizer: whether the optimizer's variables must be equal, too.

    Raises:
        LaunchError: on every rank, with the same message: who differs, and in which variable first.
    """
    mine = digests(model, with_optimizer)
    total = zlib.crc32(repr(mine).encode())
    if len(set(comm.allgather_obj(total))) == 1:
        return
    everyone = comm.allgather_obj(mine)
    if len({len(theirs) for theirs in everyone}) > 1:
        raise LaunchError(f"{when} the ranks have different numbers of variables: not one model")
    index = next(i for i, column in enumerate(zip(*everyone, strict=True)) if len(set(column)) > 1)
    name = comm.broadcast_obj(state_variables(model, with_optimizer)[index].path)
    raise LaunchError(
        f"{when} {_who_differs([theirs[index] for theirs in everyone])} in variable {name!r}: they stopped "
        "training one model. Are the gradients reduced on every step, and are all nodes of one kind?"
    )


def adjustable(model: keras.Model) -> list[Any]:
    """The optimizers of a model whose learning rate can be set; those that follow a schedule are not."""
    optimizer: Any = getattr(model, "optimizer", None)
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    several = getattr(optimizer, "optimizers", [optimizer])
    return [one for one in several if isinstance(getattr(one, "_learning_rate", None), keras.Variable)]


def _who_differs(column: list[int]) -> str:
    """``rank 2 differs from the others``: most ranks are right, and among two nobody knows."""
    right, count = Counter(column).most_common(1)[0]
    if 2 * count <= len(column):
        right = column[0]
    wrong = [rank for rank, digest in enumerate(column) if digest != right]
    others = "the others" if 2 * count > len(column) else "rank 0"
    names = " ".join(map(str, wrong))
    return f"rank {names} differs from {others}" if len(wrong) == 1 else f"ranks {names} differ from {others}"


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
