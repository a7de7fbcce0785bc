"""Sums of gradients of which each rank keeps its shard alone: gradients leave for their owners as they are made.

Micro-batches are leaves of the tree (`tree.py`), dealt out by turns: in round k, rank r has leaf k R + r. A
gradient comes in stretches of the flat array, the same ones in the same order on every rank. Of each stretch a
rank sends every owner what is its own; the owner adds what it has got from all ranks, leaf after leaf, as the
tree wants it. So the sum has the bits of one rank, and nobody ever holds a gradient of all weights: an owner
keeps at most log2(M) + 1 sums of its shard for M leaves, one of which is the result.

A rank without a leaf in the last round still receives. While a stretch is on its way the next one is made: what
was sent is waited for a little later. Every rank begins all its messages of a few pieces before it waits for any
of them or of later ones, and pieces have one order, so nobody waits in a circle.

Legend: P parameters, S of them in this rank's shard, R ranks, M micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tf_dist.comm.base import Comm, Pending
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.tree import TreeSum

# Elements of a message (1 MiB), and how many of them are begun together: of so much an owner has the leaves of
# all ranks in memory at a time, twice.
PIECE = 1 << 18
TOGETHER = 4


def dealt(micro_batches: int, rank: int, ranks: int) -> range:
    """The micro-batches of a rank, by turns."""
    return range(rank, micro_batches, ranks)


class _Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of the flat array, which are of one owner."""

    owner: int
    start: int
    stop: int


class _Sending(NamedTuple):
    """Pieces under way: their stretch, its first element, messages, and where others' arrive, by leaf."""

    flat: np.ndarray | None
    first: int
    sent: list[Pending]
    coming: list[tuple[_Piece, list[tuple[Pending, np.ndarray] | None]]]


class ShardSums:
    """Adds the gradients of all ranks' micro-batches; each rank gets its shard of the sum.

    Args:
        comm: all ranks, which all call the same methods in the same order.
        shards: the elements of each rank, (R,), back to back.
        micro_batches: M.
        stretches: of the flat array, in the order in which gradients come; together everything.
    """

    def __init__(
        self, comm: Comm, shards: Sequence[slice], micro_batches: int, stretches: Sequence[slice]
    ) -> None:
        self._comm, self._micro_batches = comm, micro_batches
        self._mine = shards[comm.rank]
        self.sum = aligned_empty(self._mine.stop - self._mine.start)
        self._groups = [_grouped(_cut(stretch, shards)) for stretch in stretches]
        self._firsts = [stretch.start for stretch in stretches]
        self._trees: dict[_Piece, TreeSum] = {}
        self._under_way: deque[_Sending] = deque()
        self._free: list[np.ndarray] = []
        self._round = 0

    @property
    def rounds(self) -> int:
        """How often each stretch is added in a step: on all ranks alike."""
        return -(-self._micro_batches // self._comm.size)

    def begin(self) -> None:
        """A step begins: the sum is no longer valid."""
        self._round = -1
        self._under_way.clear()

    def next_round(self) -> None:
        """From now on the gradients are those of the next micro-batches, one a rank at most."""
        self._round += 1

    def add(self, stretch: int, gradients: Sequence[np.ndarray]) -> None:
        """Give away a stretch of the gradient of this rank's micro-batch of the round.

        Args:
            stretch: by number; all of them in order, in every round.
            gradients: arrays that together are this stretch; none where this rank has no micro-batch.
        """
        flat = None
        if gradients:
            flat = np.concatenate([one.reshape(-1) for one in gradients]) if len(gradients) > 1 else None
            flat = gradients[0].reshape(-1) if flat is None else flat
        for group in self._groups[stretch]:
            self._under_way.append(self._start(group, flat, self._firsts[stretch]))
            if len(self._under_way) == 2:
                self._finish(self._under_way.popleft())

    def result(self) -> np.ndarray:
        """This rank's shard of the sum, (S,), once all rounds are over; valid until the next step begins."""
        while self._under_way:
            self._finish(self._under_way.popleft())
        for tree in self._trees.values():
            tree.result()
        return self.sum

    def _start(self, pieces: Sequence[_Piece], flat: np.ndarray | None, first: int) -> _Sending:
        rank, sent, coming = self._comm.rank, [], []
        leaves = min(self._comm.size, self._micro_batches - self._round * self._comm.size)
        for piece in pieces:
            if piece.owner == rank:
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
            tree = self._tree(piece)
            for leaf in leaves:
                if leaf is None:
                    assert sending.flat is not None
                    tree.add(sending.flat[piece.start - sending.first : piece.stop - sending.first])
                else:
                    leaf[0].wait()
                    tree.add(leaf[1][: piece.stop - piece.start])
                    self._free.append(leaf[1])
        for message in sending.sent:
            message.wait()

    def _tree(self, piece: _Piece) -> TreeSum:
        if piece not in self._trees:
            tree = self._trees[piece] = TreeSum(piece.stop - piece.start)
            tree.home = self.sum[piece.start - self._mine.start : piece.stop - self._mine.start]
        return self._trees[piece]


def _cut(stretch: slice, shards: Sequence[slice]) -> list[_Piece]:
    """A stretch in pieces of one owner each, in order."""
    found = []
    for owner, shard in enumerate(shards):
        start, stop = max(stretch.start, shard.start), min(stretch.stop, shard.stop)
        found += [_Piece(owner, at, min(stop, at + PIECE)) for at in range(start, stop, PIECE)]
    return found



def _grouped(pieces: list[_Piece]) -> list[list[_Piece]]:
    return [pieces[at : at + TOGETHER] for at in range(0, len(pieces), TOGETHER)]
