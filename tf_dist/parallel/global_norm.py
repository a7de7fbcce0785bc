"""Global norm of a sharded gradient: bit-identical to that of one rank, if possible.

One rank sums squares in blocks of `SQUARES_BLOCK` elements of the full gradient (`flat_buffer.norm`). If
ranks have complete variables, most of these blocks lie on one rank, which sums them as a single rank would.
Blocks that span ranks are gathered first: they are few, one for each end of a slice. If variables themselves
are partitioned, there are no such blocks, and squares are summed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.comm.transport.reduction_order import SQUARES_BLOCK, block_squares
from tf_dist.parallel.flat_buffer import TINY, norm


class SquaredRun(NamedTuple):
    """A contiguous run of a rank's gradient: its offset there, its length, its offset in the full gradient.

    ``whole`` is None if the run is not contiguous in the full gradient.
    """

    start: int
    size: int
    whole: int | None


class GlobalNorm:
    """The Euclidean norm of a sharded gradient; a collective.

    Args:
        comm: the ranks whose runs together are the full gradient.
        runs: of this rank; none of their elements is another rank's as well.
        length: elements of the full gradient.

    Attributes:
        exact: whether the bits are those of `flat_buffer.norm` of the full gradient.
    """

    def __init__(self, comm: Comm, runs: Sequence[SquaredRun], length: int) -> None:
        self.comm, self.length, self._runs = comm, length, [run for run in runs if run.size]
        placed = [run.whole is not None for run in self._runs]
        self.exact = all(comm.allgather_obj(all(placed)))
        if self.exact:
            self._arrange(comm.allgather_obj([[run.whole, run.size] for run in self._runs]))

    def _arrange(self, runs_R: list[list[list[int]]]) -> None:
        """Find the blocks that span several ranks, and this rank's part of them."""
        inside = np.zeros(self.length // SQUARES_BLOCK, bool)
        for run in (run for runs in runs_R for run in runs):
            inside[slice(*_blocks_inside(*run))] = True
        # The remainder after the last full block is treated like a block that spans ranks.
        self._divided = [*np.flatnonzero(~inside).tolist(), inside.size]
        at = {block: number * SQUARES_BLOCK for number, block in enumerate(self._divided)}
        self._edges: list[tuple[slice, int]] = []
        for start, size, whole in self._runs:
            assert whole is not None
            first, last = _blocks_inside(whole, size)
            ends = [(whole, first * SQUARES_BLOCK), (last * SQUARES_BLOCK, whole + size)]
            for begin, end in ends if first < last else [(whole, whole + size)]:
                self._note_edges(start - whole, begin, end, at)

    def _note_edges(self, shift: int, begin: int, end: int, at: dict[int, int]) -> None:
        while begin < end:
            block = begin // SQUARES_BLOCK
            stop = min(end, (block + 1) * SQUARES_BLOCK)
            self._edges.append((slice(begin + shift, stop + shift), at[block] + begin % SQUARES_BLOCK))
            begin = stop

    def __call__(self, gradient: np.ndarray, squares: np.ndarray | None = None) -> float:
        """The norm, the same on all ranks; infinite or NaN if an element is.

        Args:
            gradient: this rank's, float32, of which its runs are parts.
            squares: the sums of squares of the gradient's own blocks, if a `Comm` has computed them already:
                used if the rank has the full gradient.
        """
        if self.comm.size == 1 and self._runs == [SquaredRun(0, self.length, 0)]:
            return norm(gradient, squares)
        if self.exact:
            total = self._in_blocks(gradient)
            if TINY < total < np.inf:
                return float(np.sqrt(total))
        own = [gradient[run.start : run.start + run.size] for run in self._runs]
        squares_of = [float(np.einsum("i,i->", part, part, dtype=np.float64)) for part in own]
        sums = np.array([sum(squares_of, 0.0)])  # float64 also on a rank without elements
        with np.errstate(invalid="ignore"):
            self.comm.allreduce(sums)
            return float(np.sqrt(sums[0]))

    def _in_blocks(self, gradient: np.ndarray) -> float:
        blocks = self.length // SQUARES_BLOCK
        # One array for both: every element belongs to one rank, the others add zeros, which is exact.
        everything = np.zeros(blocks + len(self._divided) * SQUARES_BLOCK, np.float32)
        squares, divided = everything[:blocks], everything[blocks:]
        for start, size, whole in self._runs:
            assert whole is not None
            first, last = _blocks_inside(whole, size)
            if first < last:
                skip = start + first * SQUARES_BLOCK - whole
                block_squares(gradient[skip : skip + (last - first) * SQUARES_BLOCK], squares[first:last])
        for where, at in self._edges:
            divided[at : at + where.stop - where.start] = gradient[where]
        with np.errstate(over="ignore", invalid="ignore"):
            self.comm.allreduce(everything)
            more = np.empty(len(self._divided) - 1, np.float32)
            block_squares(divided[: more.size * SQUARES_BLOCK], more)
            squares[self._divided[:-1]] = more
            rest = divided[more.size * SQUARES_BLOCK :][: self.length % SQUARES_BLOCK]
            return float(squares.sum(dtype=np.float64)) + float(np.einsum("i,i->", rest, rest))


def _blocks_inside(whole: int, size: int) -> tuple[int, int]:
    """The first block inside a run, and the one after the last; equal if there is none."""
    first, last = -(-whole // SQUARES_BLOCK), (whole + size) // SQUARES_BLOCK
    return first, max(first, last)
