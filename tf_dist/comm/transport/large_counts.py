"""Arrays of more elements than one MPI 3 call can count are sent in parts.

Counts and displacements are C ints there, so 2,147,483,647 elements are the maximum: the bytes of a weight
of 2 GiB are more, and so may be the parameters of a model that a parameter server sums. Smaller arrays are
sent in one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

# Elements; changed only by tests.
MOST = (1 << 31) - 1


class LargeMessage:
    """The MPI requests of a point-to-point message, which keep its array alive."""

    def __init__(self, requests: list[Any], array: np.ndarray) -> None:
        self._requests, self._array = requests, array

    def wait(self) -> None:
        """As `tf_dist.comm.transport.base.Pending`."""
        MPI.Request.Waitall(self._requests)

    def done(self) -> bool:
        """As `tf_dist.comm.transport.base.Pending`."""
        return bool(MPI.Request.Testall(self._requests))


def isend(mpi: Any, array: np.ndarray, to: int, tag: int) -> LargeMessage:
    """Start a send. Messages with one tag arrive in order, so that parts need no tags of their own."""
    return LargeMessage([mpi.Isend(part, to, tag) for part in counted(array)], array)


def irecv(mpi: Any, array: np.ndarray, source: int, tag: int) -> LargeMessage:
    """Start a receive of what `isend` sends, of the same length."""
    return LargeMessage([mpi.Irecv(part, source, tag) for part in counted(array)], array)


def allgather(mpi: Any, array: np.ndarray, parts: Sequence[slice]) -> None:
    """All-gather ``array`` in place: rank r contributes ``parts[r]``, contiguous in rank order."""
    if array.size <= MOST:
        counts, starts = [part.stop - part.start for part in parts], [part.start for part in parts]
        mpi.Allgatherv(MPI.IN_PLACE, [array, (counts, starts)])
        return
    for root, part in enumerate(parts):
        for piece in counted(array[part]):
            mpi.Bcast(piece, root=root)


def gather(mpi: Any, array: np.ndarray, rows: np.ndarray | None, root: int) -> None:
    """Gather the arrays of all ranks into the rows of ``rows``, which only ``root`` has."""
    if array.size <= MOST:
        mpi.Gather(array, rows, root=root)
        return
    for start in range(0, array.size, MOST):
        piece = array[start : start + MOST]
        came = None if rows is None else np.empty((len(rows), piece.size), piece.dtype)
        mpi.Gather(piece, came, root=root)
        if rows is not None:
            rows[:, start : start + MOST] = came


def slices_of(parts: Sequence[slice]) -> list[list[slice]]:
    """Split parts into several lists, each with one part per rank and a countable number of elements."""
    longest = max(part.stop - part.start for part in parts)
    return [
        [slice(min(p.start + at, p.stop), min(p.start + at + MOST, p.stop)) for p in parts]
        for at in range(0, longest, MOST)
    ]


def counted(array: np.ndarray) -> list[np.ndarray]:
    """Parts of an array that MPI can count; one, if it is empty."""
    return chunks(array, MOST) or [array]


def chunks(array: np.ndarray, length: int) -> list[np.ndarray]:
    """Split into parts of this length; the last one may be shorter."""
    return [array[start : start + length] for start in range(0, array.size, length)]
