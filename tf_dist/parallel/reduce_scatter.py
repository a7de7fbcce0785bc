"""Reduce-scatter of gradients, as they are computed: each rank gets its shard of the sum.

Micro-batches are leaves of the tree (`reduction_tree.py`), assigned round-robin: in round k, rank r has leaf
k R + r. A gradient arrives in slices of the flat array, the same ones in the same order on every rank. Of
each slice a rank sends every owner its part; the owner adds the parts of all ranks, leaf by leaf, in tree
order. So the sum has the bits of one rank, and no rank ever holds a gradient of all weights: an owner keeps
at most log2(M) + 1 sums for M leaves, one of which is the result; the others are freed once a slice has all
of its leaves.

A rank without a leaf in the last round still receives. While a slice is in flight the next one is computed:
the wait for sends is deferred. Every rank starts all its messages of a few chunks before it waits
for any of them or of later ones, and chunks have one order, so there is no deadlock.

Legend: P parameters, S of them in this rank's shard, R ranks, M micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tf_dist.comm.transport.base import Comm, Pending
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.reduction_tree import TreeSum

# Elements of a message (1 MiB), and how many of them are in flight together: for so many, an owner holds the
# leaves of all ranks in memory, twice.
PIECE = 1 << 18
TOGETHER = 4


def dealt(micro_batches: int, rank: int, ranks: int) -> range:
    """The micro-batches of a rank, round-robin."""
    return range(rank, micro_batches, ranks)


class _Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of the flat array, all of one owner."""

    owner: int
    start: int
    stop: int


class _Sending(NamedTuple):
    """Chunks in flight: their slice, its first element, messages, and receive buffers, by leaf."""

    flat: np.ndarray | None
    first: int
    sent: list[Pending]
    coming: list[tuple[_Piece, list[tuple[Pending, np.ndarray] | None]]]


class ShardSums:
    """Reduce-scatters the gradients of all ranks' micro-batches; each rank gets its shard of the sum.

    Args:
        comm: all ranks, which all call the same methods in the same order.
        shards: the elements of each rank, (R,), contiguous.
        micro_batches: M.
        stretches: slices of the flat array, in the order in which gradients arrive; together everything.

    Attributes:
        rounds: how often each slice is added in a step, the same on all ranks.
    """

    def __init__(
        self, comm: Comm, shards: Sequence[slice], micro_batches: int, stretches: Sequence[slice]
    ) -> None:
        self._comm, self._micro_batches = comm, micro_batches
        self.rounds = -(-micro_batches // comm.size)
        self._mine = shards[comm.rank]
        self._sum = aligned_empty(self._mine.stop - self._mine.start)
        self._groups = [_grouped(_cut(stretch, shards)) for stretch in stretches]
        self._firsts = [stretch.start for stretch in stretches]
        self._trees: dict[_Piece, tuple[TreeSum, list[int]]] = {}
        self._under_way: deque[_Sending] = deque()
        self._free: list[np.ndarray] = []

    def add(self, stretch: int, turn: int, gradients: Sequence[np.ndarray]) -> None:
        """Send a slice of the gradient of this rank's micro-batch of a round to its owners.

        Args:
            stretch: index of the slice.
            turn: the round; for each slice they come in order.
            gradients: arrays that together are this slice; empty if this rank has no micro-batch. They
                may be read until the next `add`, or `result`.
        """
        flat = None
        if gradients:
            flat = np.concatenate([one.reshape(-1) for one in gradients]) if len(gradients) > 1 else None
            flat = gradients[0].reshape(-1) if flat is None else flat
        leaves = min(self._comm.size, self._micro_batches - turn * self._comm.size)
        for group in self._groups[stretch]:
            self._under_way.append(self._start(group, flat, self._firsts[stretch], leaves))
            if len(self._under_way) == 2:
                self._finish(self._under_way.popleft())

    def result(self) -> np.ndarray:
        """The rank's shard of the sum, (S,), once all was added; valid until the next `add`."""
        while self._under_way:
            self._finish(self._under_way.popleft())
        assert not self._trees, "a stretch has not come from all micro-batches"
        return self._sum

    def _start(self, pieces: Sequence[_Piece], flat: np.ndarray | None, first: int, leaves: int) -> _Sending:
        sent: list[Pending] = []
        coming = []
        for piece in pieces:
            if piece.owner == self._comm.rank:
                coming.append((piece, [self._receive(piece, leaf) for leaf in range(leaves)]))
            elif flat is not None:
                sent.append(self._comm.isend(flat[piece.start - first : piece.stop - first], piece.owner))
        return _Sending(flat, first, sent, coming)

    def _receive(self, piece: _Piece, leaf: int) -> tuple[Pending, np.ndarray] | None:
        if leaf == self._comm.rank:
            return None
        room = self._free.pop() if self._free else aligned_empty(PIECE)
        return self._comm.irecv(room[: piece.stop - piece.start], leaf), room

    def _finish(self, sending: _Sending) -> None:
        for piece, leaves in sending.coming:
            for leaf in leaves:
                if leaf is None:
                    assert sending.flat is not None
                    self._add(piece, sending.flat[piece.start - sending.first : piece.stop - sending.first])
                else:
                    message, room = leaf
                    message.wait()
                    self._add(piece, room[: piece.stop - piece.start])
                    self._free.append(room)
        for message in sending.sent:
            message.wait()

    def _add(self, piece: _Piece, leaf: np.ndarray) -> None:
        if piece not in self._trees:
            made = TreeSum(piece.stop - piece.start)
            made.home = self._sum[piece.start - self._mine.start : piece.stop - self._mine.start]
            self._trees[piece] = made, [self._micro_batches]
        tree, missing = self._trees[piece]
        tree.add(leaf)
        missing[0] -= 1
        if not missing[0]:
            tree.result()
            del self._trees[piece]


def _cut(stretch: slice, shards: Sequence[slice]) -> list[_Piece]:
    """Split a slice into chunks of one owner each, in order."""
    found = []
    for owner, shard in enumerate(shards):
        start, stop = max(stretch.start, shard.start), min(stretch.stop, shard.stop)
        found += [_Piece(owner, at, min(stop, at + PIECE)) for at in range(start, stop, PIECE)]
    return found


def _grouped(pieces: list[_Piece]) -> list[list[_Piece]]:
    return [pieces[at : at + TOGETHER] for at in range(0, len(pieces), TOGETHER)]
