"""`SharedWindow`: shared memory of the ranks of a node, in which gradients are stored and summed in place.

An MPI-3 shared-memory window (Hoefler et al. 2013). Each rank stores its terms in it, so nothing is sent. A
sum is two barriers and one pass: every rank adds its slice of all terms in order, in place, and computes the
sum of its squares while it is in the cache. R ranks with a term each of S bytes read R S and write S.

Between nodes each rank exchanges its slice of what its node could not add alone with the ranks that own the
same slice elsewhere: all ranks of a node use the network at once, and no byte crosses it twice.

The term that holds the result is double-buffered. Ranks read the sum there while its owner already
writes the first term of the next step, and no rank writes the same buffer before all have reached that step's
barrier.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from tf_dist.comm.transport.reduction_order import (
    ADDED_AT_ONCE,
    SQUARES_BLOCK,
    Reduced,
    ReductionOrder,
    add_in_order,
    block_squares,
    slices_of_blocks,
)

PAGE_BYTES = 4096
# Location of MPI's shared memory on Linux. A container may have little; writing beyond it kills the process.
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - inspected, not written to

Between = Callable[[list[np.ndarray], np.ndarray], None]


class NodeShare(NamedTuple):
    """A node's part of a `ReductionOrder`. Terms are numbered within the node, in the order of its ranks.

    counts: terms of each of its ranks. additions: made within the node. left: terms that remain after them.
    """

    counts: tuple[int, ...]
    additions: tuple[tuple[int, int], ...]
    left: tuple[int, ...]


def by_node(order: ReductionOrder, nodes: Sequence[Sequence[int]]) -> tuple[list[NodeShare], ReductionOrder]:
    """Divide the additions of an order into those within nodes, which come first, and those between them.

    An addition belongs to a node if both operands consist of terms of that node.

    Args:
        order: over all ranks.
        nodes: the ranks of each node, ascending; the first one has rank 0.

    Returns:
        The share of each node; and the order of the remaining additions, in which a "rank" is a node.
    """
    starts = [0, *accumulate(order.counts)]
    terms = [[term for rank in ranks for term in range(starts[rank], starts[rank + 1])] for ranks in nodes]
    holds = {term: {node} for node, mine in enumerate(terms) for term in mine}
    inner: list[list[tuple[int, int]]] = [[] for _ in nodes]
    outer: list[tuple[int, int]] = []
    for i, j in order.additions:
        together = holds[i] | holds[j]
        (inner[min(together)] if len(together) == 1 else outer).append((i, j))
        holds[i] = together
    added = {j for additions in inner for _, j in additions}
    left = [[term for term in mine if term not in added] for mine in terms]
    place = {term: number for number, term in enumerate(chain.from_iterable(left))}
    shares = []
    for ranks, mine, additions, remaining in zip(nodes, terms, inner, left, strict=True):
        local = {term: number for number, term in enumerate(mine)}
        shares.append(
            NodeShare(
                tuple(order.counts[rank] for rank in ranks),
                tuple((local[i], local[j]) for i, j in additions),
                tuple(local[term] for term in remaining),
            )
        )
    return shares, ReductionOrder(tuple(map(len, left)), tuple((place[i], place[j]) for i, j in outer))


class SharedWindow:
    """The terms of a node in shared memory, and their sum.

    Args:
        node: the ranks that share it; a collective.
        length: float32 elements of a term.
        share: this node's.
        between: adds the terms of all nodes, given slices of this node's, and the output slice;
            None if there is one node.

    Raises:
        MPI.Exception: shared memory is not available.
    """

    def __init__(
        self, node: MPI.Intracomm, length: int, share: NodeShare, between: Between | None = None
    ) -> None:
        self._node, self._share, self._between = node, share, between
        self._turn = 0
        size = bytes_needed(length, share)
        window = MPI.Win.Allocate_shared(size if node.rank == 0 else 0, 1, comm=node)
        self._keep = window  # never freed while arrays may refer to it
        memory = np.asarray(window.Shared_query(0)[0])
        start = -memory.ctypes.data % PAGE_BYTES
        everything = memory[start : start + size - PAGE_BYTES].view(np.float32)
        step, count = _rounded(length), sum(share.counts)
        self._memory = everything
        buffers = [everything[at * step : at * step + length] for at in range(max(count, 1) + 1)]
        self._result = share.left[0] if share.left else 0
        other = list(buffers[:-1])
        other[self._result] = buffers[-1]
        self._terms = (buffers[:-1], other)  # double buffer of the result
        self._squares = everything[len(buffers) * step :][: length // SQUARES_BLOCK]
        first = sum(share.counts[: node.rank])
        self._mine = slice(first, first + share.counts[node.rank])
        for terms in self._terms:  # first touch: pages are placed near this rank's core
            for term in terms[self._mine]:
                term.fill(0.0)
        self._slice = _slice_of(length, node.rank, node.size)
        node.Barrier()

    def buffers(self) -> list[np.ndarray]:
        """Buffers for this rank's terms of the next sum."""
        return self._terms[self._turn][self._mine]

    def everyones(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The terms of all ranks of the node for the next sum, and its output buffer."""
        places = self._terms[self._turn]
        return list(places), places[self._result]

    def turn(self) -> None:
        """Swap buffers after a sum that was made in `everyones` by other means, on all ranks of the node."""
        self._turn = 1 - self._turn

    def covers(self, array: np.ndarray) -> bool:
        """Whether an array lies in this window."""
        return bool(np.may_share_memory(self._memory, array))

    def holds(self, terms: Sequence[np.ndarray]) -> bool:
        """Whether these are this rank's `buffers`; False if it has none."""
        return all(
            place.ctypes.data == term.ctypes.data for place, term in zip(self.buffers(), terms, strict=True)
        )

    def sum(self, terms: Sequence[np.ndarray]) -> Reduced:
        """Add the terms of all ranks; a collective.

        Args:
            terms: this rank's; copied unless they are `buffers`.

        Returns:
            The sum, shared by all ranks of the node: valid until the next sum, read-only.
        """
        if not self.holds(terms):
            for place, term in zip(self.buffers(), terms, strict=True):
                np.copyto(place, term)
        places = self._terms[self._turn]
        self._node.Barrier()
        self._add([place[self._slice] for place in places])
        self._node.Barrier()
        self.turn()
        return Reduced(places[self._result], self._squares)

    def _add(self, mine: Sequence[np.ndarray]) -> None:
        """Add this rank's slice of all terms."""
        result, first = mine[self._result], self._slice.start // SQUARES_BLOCK
        if self._between is not None:
            add_in_order(mine, self._share.additions)
            self._between([mine[term] for term in self._share.left], result)
        for start in range(0, result.size, ADDED_AT_ONCE):
            parts = [term[start : start + ADDED_AT_ONCE] for term in mine]
            if self._between is None:
                add_in_order(parts, self._share.additions)
            part, at = parts[self._result], first + start // SQUARES_BLOCK
            block_squares(part, self._squares[at : at + part.size // SQUARES_BLOCK])


def bytes_needed(length: int, share: NodeShare) -> int:
    """Shared memory for all terms of a node, a second result buffer, and squares."""
    squares = _rounded(length // SQUARES_BLOCK)
    return 4 * ((max(sum(share.counts), 1) + 1) * _rounded(length) + squares) + PAGE_BYTES


def shortage(length: int, share: NodeShare) -> str:
    """Why this node's shared memory does not suffice for a window of this size; empty if it does."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return ""  # not Linux
    free, needed = found.f_bavail * found.f_frsize, bytes_needed(length, share)
    if free >= needed * 1.1:
        return ""
    return f"{SHARED_MEMORY} has {free >> 20} MB left, {needed >> 20} MB are needed"


def _slice_of(length: int, rank: int, size: int) -> slice:
    """The elements that a rank adds: full blocks of squares, and the remainder on the last rank."""
    return slices_of_blocks(length, size)[rank]


def _rounded(elements: int) -> int:
    """Round up to full pages of float32: terms of different ranks share none."""
    return -(-4 * elements // PAGE_BYTES) * PAGE_BYTES // 4
