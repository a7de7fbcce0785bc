"""`Window`: memory that the ranks of a node share, in which gradients lie and are summed where they are.

An MPI-3 shared-memory window (Hoefler et al. 2013). Each rank has its terms in it, so nothing is sent. A sum
is two barriers and one pass: every rank adds its slice of all terms into the first term, in order, and takes
the sum of its squares while it is in the cache. R ranks with a term each of S bytes read R S and write S.

The first term lies in two places by turns. Ranks read the sum there while its owner is already writing the
first term of the next step, and nobody writes the same place before all have come to that step's barrier.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from tf_dist.comm.base import SQUARES_BLOCK, Order, Sum, block_squares

# Elements that are added before the next ones: all terms of them stay in a core's cache.
AT_ONCE = 32 * SQUARES_BLOCK
PAGE_BYTES = 4096
# Where MPI libraries have shared memory on Linux. A container may have little; writing beyond it kills.
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - looked at, not written to


class Window:
    """The terms of one `Order` in shared memory, and their sum.

    Args:
        node: the ranks that share it; a collective.
        length: float32 elements of a term.
        order: of the sum; its ranks are those of ``node``.

    Raises:
        MPI.Exception: there is no shared memory to be had, on every rank.
    """

    def __init__(self, node: MPI.Intracomm, length: int, order: Order) -> None:
        self._node, self.length, self.order = node, length, order
        self._turn = 0
        places = bytes_needed(length, order)
        window = MPI.Win.Allocate_shared(places if node.rank == 0 else 0, 1, comm=node)
        self._keep = window  # never freed while arrays may look into it
        memory = np.asarray(window.Shared_query(0)[0])
        start = -memory.ctypes.data % PAGE_BYTES
        everything = memory[start : start + places - PAGE_BYTES].view(np.float32)
        step = _rounded(length)
        buffers = [everything[at * step : at * step + length] for at in range(sum(order.counts) + 1)]
        # Terms by turn: they differ in the first one.
        self._terms = (buffers[:-1], [buffers[-1], *buffers[1:-1]])
        self._squares = everything[len(buffers) * step :][: length // SQUARES_BLOCK]
        first = sum(order.counts[: node.rank])
        self._mine = slice(first, first + order.counts[node.rank])
        for terms in self._terms:  # a page lies where it is first written to: near this rank's core
            for term in terms[self._mine]:
                term.fill(0.0)
        self._slice = _slice_of(length, node.rank, node.size)
        node.Barrier()

    def buffers(self) -> list[np.ndarray]:
        """Where this rank's terms of the next sum belong."""
        return self._terms[self._turn][self._mine]

    def holds(self, terms: Sequence[np.ndarray]) -> bool:
        """Whether these are this rank's `buffers`; none are, where it has none."""
        return all(
            place.ctypes.data == term.ctypes.data for place, term in zip(self.buffers(), terms, strict=True)
        )

    def sum(self, terms: Sequence[np.ndarray]) -> Sum:
        """Add the terms of all ranks; a collective.

        Args:
            terms: this rank's; copied unless they are `buffers`.

        Returns:
            The sum, which all ranks look at in one place: valid until the next sum, and never written to.
        """
        if not self.holds(terms):
            for place, term in zip(self.buffers(), terms, strict=True):
                np.copyto(place, term)
        everyones = self._terms[self._turn]
        self._node.Barrier()
        self._add(everyones)
        self._node.Barrier()
        self._turn = 1 - self._turn
        return Sum(everyones[0], self._squares)

    def _add(self, terms: Sequence[np.ndarray]) -> None:
        for start in range(self._slice.start, self._slice.stop, AT_ONCE):
            stop = min(start + AT_ONCE, self._slice.stop)
            parts = [term[start:stop] for term in terms]
            for i, j in self.order.additions:
                parts[i] += parts[j]
            block_squares(parts[0], self._squares[start // SQUARES_BLOCK : stop // SQUARES_BLOCK])


def bytes_needed(length: int, order: Order) -> int:
    """Shared memory for all terms, once more the first one, and squares."""
    squares = _rounded(length // SQUARES_BLOCK)
    return 4 * ((sum(order.counts) + 1) * _rounded(length) + squares) + PAGE_BYTES


def why_not(node: MPI.Intracomm, length: int, order: Order) -> str:
    """Why a window of this size cannot be had, the same on all ranks; nothing if it can. A collective."""
    reason = ""
    if node.rank == 0:
        try:
            found = os.statvfs(SHARED_MEMORY)
            free, needed = found.f_bavail * found.f_frsize, bytes_needed(length, order)
            if free < needed * 1.1:
                reason = f"{SHARED_MEMORY} has {free >> 20} MB left, {needed >> 20} MB are needed"
        except OSError:
            pass  # elsewhere than on Linux
    size = np.array([len(reason.encode())], np.int64)
    node.Bcast(size)
    raw = np.frombuffer(reason.encode(), np.uint8).copy() if node.rank == 0 else np.empty(size[0], np.uint8)
    node.Bcast(raw)
    return raw.tobytes().decode()


def _slice_of(length: int, rank: int, size: int) -> slice:
    """The elements that a rank adds: whole blocks of squares, and for the last rank what is left."""
    blocks = length // SQUARES_BLOCK
    start, stop = (blocks * place // size * SQUARES_BLOCK for place in (rank, rank + 1))
    return slice(start, length if rank == size - 1 else stop)


def _rounded(elements: int) -> int:
    """Up to whole pages of float32: terms of different ranks share none."""
    return -(-4 * elements // PAGE_BYTES) * PAGE_BYTES // 4
