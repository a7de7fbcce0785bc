"""Passes of a rank that shares rows with others: it has some of their tokens (`tf_dist.layers.sequence`).

Legend: B rows of a micro-batch, T tokens, s ranks, L = T / s, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.parallel.buckets import Overlap
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.sequence import columns
from tf_dist.parallel.totals import Totals
from tf_dist.parallel.tree import BlockSum
from tf_dist.training.passes import MicroBatch, WholePasses
from tf_dist.training.replica import Replica


def passes_of_rows(
    replica: Replica, micro_batches: Sequence[int], sums: BlockSum, overlap: Overlap, mesh: Mesh
) -> WholePasses:
    """Passes of whole rows, or of this rank's tokens of them; arguments are those of `WholePasses`."""
    given = (replica, micro_batches, sums, overlap, mesh.speaks)
    return SharedRowPasses(*given, mesh.sequence) if mesh.sequence.size > 1 else WholePasses(*given)


class SharedRowPasses(WholePasses):
    """`WholePasses` of a model that takes L of the T tokens of each row.

    Every rank counts the losses of its own tokens, so that `Totals` adds up to those of whole rows. Ranks
    that share rows do all of this together: they have the same micro-batches.

    Args:
        replica: its model, of L tokens.
        micro_batches: as in `WholePasses`.
        sums: as in `WholePasses`.
        overlap: as in `WholePasses`.
        speaks: as in `WholePasses`.
        comm: the ranks that share rows, `Mesh.sequence`.
    """

    def __init__(
        self,
        replica: Replica,
        micro_batches: Sequence[int],
        sums: BlockSum,
        overlap: Overlap,
        speaks: bool,
        comm: Comm,
    ) -> None:
        super().__init__(replica, micro_batches, sums, overlap, speaks)
        self._comm, seq_len = comm, replica.seq_len * comm.size
        self._columns = [columns(seq_len, rank, comm.size) for rank in range(comm.size)]

    def train(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `Passes`, from whole rows."""
        super().train(step, self._own(batches), totals)

    def again(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> Iterator[np.ndarray]:
        """As in `Passes`, from whole rows."""
        return super().again(step, self._own(batches), totals)

    def evaluate(self, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `Passes`, from whole rows."""
        super().evaluate(self._own(batches), totals)

    def logits(self, x_1xT: np.ndarray) -> np.ndarray:
        """As in `Passes`."""
        own_LxV = super().logits(self._take(x_1xT))
        size = own_LxV.size
        everyone = aligned_empty(size * self._comm.size)
        parts = [slice(rank * size, (rank + 1) * size) for rank in range(self._comm.size)]
        everyone[parts[self._comm.rank]] = own_LxV.reshape(-1)
        self._comm.allgather(everyone, parts)
        logits_TxV = np.empty((x_1xT.shape[1], own_LxV.shape[1]), np.float32)
        for places, part in zip(self._columns, parts, strict=True):
            logits_TxV[places] = everyone[part].reshape(own_LxV.shape)
        return logits_TxV

    def _own(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        return [MicroBatch(number, self._take(x), self._take(y)) for number, x, y in batches]

    def _take(self, array_BxT: np.ndarray) -> np.ndarray:
        return np.take(array_BxT, self._columns[self._comm.rank], axis=1)
