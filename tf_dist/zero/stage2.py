"""ZeRO stage 2: gradients are reduce-scattered while the backward pass computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.parallel.buckets import BUCKET_BYTES, LAST_BUCKET_BYTES, divide
from tf_dist.parallel.reduce_scatter import ShardSums
from tf_dist.parallel.totals import Totals
from tf_dist.runners.grad_hooks import hooked_gradients
from tf_dist.runners.runner import MicroBatch, WholeRunner
from tf_dist.zero.sharded_replica import ShardedReplica


class ZeRO2Runner(WholeRunner):
    """As `WholeRunner`, but each rank keeps only its shard of the summed gradient.

    Args:
        replica: this rank's.
        micro_batches: of a global batch; a rank's are `tf_dist.parallel.reduce_scatter.dealt`.
        comm: the ranks that share gradients.
        reports_loss: whether this rank reports losses.

    Attributes:
        divided: the variables of each bucket, in the order in which gradients are sent.
    """

    local_gradients = False
    said = "gradients leave for their owners during the backward pass"

    def __init__(self, replica: ShardedReplica, micro_batches: int, comm: Comm, reports_loss: bool) -> None:
        self.replica, self._speaks = replica, reports_loss
        starts = replica.layout.starts
        self.divided = divide(replica.layout.sizes, BUCKET_BYTES, LAST_BUCKET_BYTES)
        stretches = [slice(starts[bucket.start], starts[bucket.stop]) for bucket in self.divided]
        self._shard_sums = ShardSums(comm, replica.shards, micro_batches, stretches)
        self._turn = 0
        self._gradients: Callable[..., Any] | None = None

    def forward_backward(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `ModelRunner`; a collective."""
        if self._gradients is None:
            self._gradients = hooked_gradients(self.replica, self)
        self.replica.moving.begin_step()
        for turn in range(self._shard_sums.rounds):
            self._turn = turn
            if turn >= len(batches):
                for bucket in range(len(self.divided)):
                    self.add(bucket, [])
                continue
            number, x_BxT, y_BxT = batches[turn]
            with self.replica.moving_restored():
                sums = self._gradients(x_BxT, y_BxT, self.replica.random_states((step, number)))
            self.replica.moving.note(number)
            if self._speaks:
                totals.add(number, np.asarray(sums, np.float64))

    def add(self, bucket: int, gradients: Sequence[np.ndarray]) -> None:
        """Reduce-scatter the gradients of a bucket; empty if this rank has no micro-batch."""
        self._shard_sums.add(bucket, self._turn, gradients)

    def gradients(self) -> list[np.ndarray]:
        """The rank's shard of the sum, alone."""
        return [self._shard_sums.result()]

    def recompute_gradients(
        self, step: int, batches: Sequence[MicroBatch], totals: Totals
    ) -> Iterator[np.ndarray]:
        """As in `ModelRunner`: the rank's shard of the sum."""
        self.forward_backward(step, batches, totals)
        yield from self.gradients()
