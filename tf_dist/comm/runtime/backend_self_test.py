"""Backend self-test: check, before the first step, that the ranks really communicate.

A backend that does nothing is the worst failure of data parallelism: every rank trains its own model, the
loss falls, and there is no error. So each verb runs on values that only correct communication can produce:
formulas in rank and size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.comm.transport.reduction_order import ReductionOrder
from tf_dist.errors import LaunchError

LENGTH = 1000


def prove(comm: Comm) -> None:
    """Test every verb on values that depend on the rank; a collective.

    Raises:
        LaunchError: a result is wrong: the backend did not reduce, or not over all ranks. On every rank,
            unless `allgather_obj` itself is broken: then on the ranks that notice.
    """
    wrong = [
        text for text in (_allreduces(comm), _adds_terms(comm), _broadcasts(comm), _gathers(comm)) if text
    ]
    # The last verb carries the verdict; if that one is broken, each rank still has its own.
    everyone = comm.allgather_obj([comm.rank, wrong])
    if [rank for rank, _ in everyone] != list(range(comm.size)):
        wrong = [*wrong, f"allgather_obj returned the values of ranks {[rank for rank, _ in everyone]}"]
    failed = [(rank, texts) for rank, texts in [*everyone, (comm.rank, wrong)] if texts]
    if failed:
        rank, texts = failed[0]
        raise LaunchError(
            f"the ranks do not talk: {type(comm).__name__} was tried on {comm.size} ranks, and on rank "
            f"{rank} "
            + "; ".join(texts)
            + ". Every rank would train a model of its own. Is the backend built for this MPI?"
        )


def _allreduces(comm: Comm) -> str:
    """Sums of 1..R and of their squares: R copies of one rank, or a missing rank, give other results."""
    ramp_N = np.arange(LENGTH) % 7
    R = comm.size
    for dtype in (np.float32, np.float64):
        array = (ramp_N * (comm.rank + 1) + (comm.rank + 1) ** 2).astype(dtype)
        comm.allreduce(array)
        expected = ramp_N * (R * (R + 1) // 2) + R * (R + 1) * (2 * R + 1) // 6
        if not np.array_equal(array, expected):
            return _difference(f"allreduce of {array.dtype}", array, expected)
    return ""


def _adds_terms(comm: Comm) -> str:
    """The reduction of gradients: one term per rank, small integers, so that any order is exact."""
    R, ramp_N = comm.size, (np.arange(LENGTH) % 7).astype(np.float32)
    term = ramp_N * np.float32(comm.rank + 1)
    comm.allreduce_terms([term], ReductionOrder((1,) * R, tuple((0, rank) for rank in range(1, R))), term)
    expected = ramp_N * (R * (R + 1) // 2)
    return "" if np.array_equal(term, expected) else _difference("allreduce_terms", term, expected)


def _broadcasts(comm: Comm) -> str:
    for root in {0, comm.size - 1}:
        array = np.full(LENGTH, float(comm.rank))
        comm.broadcast(array, root)
        if not np.array_equal(array, np.full(LENGTH, float(root))):
            return _difference(f"broadcast from rank {root}", array, np.full(LENGTH, float(root)))
    return ""


def _gathers(comm: Comm) -> str:
    rows_RxN = comm.gather(np.full(LENGTH, float(comm.rank)))
    if comm.rank != 0:
        return ""
    expected_RxN = np.repeat(np.arange(float(comm.size)), LENGTH).reshape(comm.size, LENGTH)
    if rows_RxN is None or not np.array_equal(rows_RxN, expected_RxN):
        return _difference("gather", rows_RxN, expected_RxN)
    return ""


def _difference(what: str, found: Any, expected: np.ndarray) -> str:
    """The first wrong number, and its expected value."""
    if np.shape(found) != expected.shape:
        return f"{what} returned the shape {np.shape(found)}, not {expected.shape}"
    place = int(np.argmax(np.ravel(found != expected)))
    return f"{what} returned {np.ravel(found)[place]:g}, not {np.ravel(expected)[place]:g}"
