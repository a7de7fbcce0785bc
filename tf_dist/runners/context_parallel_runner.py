"""Forward and backward of a context-parallel rank (`tf_dist.layers.context_parallel`).

Legend: B rows of a micro-batch, T tokens, s ranks, L = T / s, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.decoding.forward import CachedForward
from tf_dist.models.incremental import NotIncremental
from tf_dist.parallel.buckets import BucketOverlap
from tf_dist.parallel.context_partition import columns
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.reduction_tree import BlockSum
from tf_dist.parallel.totals import Totals
from tf_dist.runners.replica import Replica
from tf_dist.runners.runner import MicroBatch, WholeRunner, outputs_by_row


def make_runner(
    replica: Replica, micro_batches: Sequence[int], sums: BlockSum, overlap: BucketOverlap, mesh: Mesh
) -> WholeRunner:
    """Create the runner of full rows, or of this rank's tokens of them; arguments as of `WholeRunner`."""
    given = (replica, micro_batches, sums, overlap, mesh.reports_loss)
    return ContextParallelRunner(*given, mesh.sequence) if mesh.sequence.size > 1 else WholeRunner(*given)


class ContextParallelRunner(WholeRunner):
    """`WholeRunner` of a model that takes L of the T tokens of each row.

    Every rank counts the losses of its own tokens, so that `Totals` adds up to those of full rows. Ranks
    that partition rows call all methods together: they have the same micro-batches.

    Args:
        replica: its model, of L tokens.
        micro_batches: as in `WholeRunner`.
        sums: as in `WholeRunner`.
        overlap: as in `WholeRunner`.
        reports_loss: as in `WholeRunner`.
        comm: the ranks that partition rows, `Mesh.sequence`.
    """

    def __init__(
        self,
        replica: Replica,
        micro_batches: Sequence[int],
        sums: BlockSum,
        overlap: BucketOverlap,
        reports_loss: bool,
        comm: Comm,
    ) -> None:
        super().__init__(replica, micro_batches, sums, overlap, reports_loss)
        self._comm, seq_len = comm, replica.seq_len * comm.size
        self._columns = [columns(seq_len, rank, comm.size) for rank in range(comm.size)]

    def forward_backward(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `ModelRunner`, from whole rows."""
        super().forward_backward(step, self._own(batches), totals)

    def recompute_gradients(
        self, step: int, batches: Sequence[MicroBatch], totals: Totals
    ) -> Iterator[np.ndarray]:
        """As in `ModelRunner`, from whole rows."""
        return super().recompute_gradients(step, self._own(batches), totals)

    def evaluate(self, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `ModelRunner`, from full rows."""
        super().evaluate(self._own(batches), totals)

    def logits(self, x_1xT: np.ndarray) -> np.ndarray:
        """As in `ModelRunner`."""
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

    def outputs(self, x_BxT: np.ndarray) -> np.ndarray:
        """As in `ModelRunner`."""
        return outputs_by_row(self, x_BxT)

    def cached_forward(self) -> CachedForward:
        """As in `ModelRunner`, which it always refuses."""
        raise NotIncremental("ranks share the tokens of a row")

    def _own(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        return [MicroBatch(number, self._take(x), self._take(y)) for number, x, y in batches]

    def _take(self, array_BxT: np.ndarray) -> np.ndarray:
        return np.take(array_BxT, self._columns[self._comm.rank], axis=1)
