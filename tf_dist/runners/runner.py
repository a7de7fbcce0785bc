"""Model runner: forward and backward, evaluation and logits of a rank's micro-batches.

`WholeRunner` runs the full model, one micro-batch after another. With pipeline parallelism
(`tf_dist.pipeline.runner`) the same micro-batches pass from rank to rank.

Legend: B rows of a micro-batch, T tokens, V vocabulary, P parameters of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from tf_dist.decoding.forward import CachedForward
from tf_dist.parallel.buckets import BucketOverlap
from tf_dist.parallel.reduction_tree import BlockSum
from tf_dist.parallel.totals import Totals
from tf_dist.runners.grad_hooks import OverlappedGradients
from tf_dist.runners.inference import Inference, WholeInference
from tf_dist.runners.replica import Replica


class MicroBatch(NamedTuple):
    """Rows of a global batch: index of the micro-batch; token ids and targets, (B, T) int32."""

    number: int
    x_BxT: np.ndarray
    y_BxT: np.ndarray


class ModelRunner(Inference, Protocol):
    """How this rank runs its part of a model on micro-batches, whatever that part is.

    It is `WholeRunner`, `ContextParallelRunner`, `PipelineRunner`, `ZeRO2Runner` or `ZeRO3Runner`; the
    Trainer and its guards use these verbs, and never ask which one.

    Attributes:
        local_gradients: True if `recompute_gradients` yields local gradients; False if it yields this rank's
            shard of the sum.
        gathers_weights: True if every forward pass is a collective of all ranks that share weights.
    """

    local_gradients: bool

    @property
    def said(self) -> str:
        """Status line, or empty."""

    def forward_backward(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """Forward and backward of this rank's micro-batches, in their order; adds to the rank's sums.

        A collective of the ranks that share the model.

        Args:
            step: with the index of the micro-batch and the seed it determines dropout.
            batches: those of this rank's coordinate along the data axis.
            totals: receives losses and counts, on ranks where `Mesh.reports_loss`.
        """

    def gradients(self) -> list[np.ndarray]:
        """The sums of `forward_backward`, which begin anew: the terms of `Comm.allreduce_terms`.

        Returns:
            (P,) float32 each, which may be used up; with ZeRO of stage 2 and 3 this rank's shard of the sum
            over data-parallel ranks.
        """

    def recompute_gradients(
        self, step: int, batches: Sequence[MicroBatch], totals: Totals
    ) -> Iterator[np.ndarray]:
        """The gradients of a step that was taken, once more, to be looked at; a collective, to its end.

        Arguments are those of `forward_backward`.

        Yields:
            (P,) float32, or a shard: used before the next one is asked for, and may be written to.
        """

    def evaluate(self, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """The losses and counts of `forward_backward`, without dropout and without a gradient."""

    def logits(self, x_1xT: np.ndarray) -> np.ndarray:
        """The logits (T, V) of one row, (1, T) int32, on every rank; a collective."""


class WholeRunner:
    """A rank with all layers of the model.

    Args:
        replica: its model.
        micro_batches: indices of this rank's micro-batches, in order.
        sums: receives a gradient of each.
        overlap: whether gradients are reduced during the backward pass.
        reports_loss: whether this rank reports losses.
    """

    local_gradients = True
    gathers_weights = False

    def __init__(
        self,
        replica: Replica,
        micro_batches: Sequence[int],
        sums: BlockSum,
        overlap: BucketOverlap,
        reports_loss: bool,
    ) -> None:
        self.replica, self.sums, self._speaks = replica, sums, reports_loss
        self.overlap = OverlappedGradients(replica, sums, micro_batches, overlap)

    @cached_property
    def _inference(self) -> WholeInference:
        return WholeInference(self.replica.model, self.replica.seq_len)

    @property
    def said(self) -> str:
        """As in `ModelRunner`."""
        return self.overlap.said

    def forward_backward(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `ModelRunner`."""
        self.replica.moving.begin_step()
        for number, x_BxT, y_BxT in batches:
            draw = (step, number)
            if self.overlap.leaves(number):
                sums = self.overlap.gradients(x_BxT, y_BxT, draw)
            else:
                gradient, sums = self.replica.gradients(x_BxT, y_BxT, draw)
                self.sums.add(gradient)
            self.replica.moving.note(number)
            if self._speaks:
                totals.add(number, sums)

    def gradients(self) -> list[np.ndarray]:
        """As in `ModelRunner`; they may be on their way."""
        return self.overlap.terms()

    def recompute_gradients(
        self, step: int, batches: Sequence[MicroBatch], totals: Totals
    ) -> Iterator[np.ndarray]:
        """As in `ModelRunner`: the gradient of each micro-batch, none of which leaves."""
        for number, x_BxT, y_BxT in batches:
            yield np.array(self.replica.gradients(x_BxT, y_BxT, (step, number))[0])

    def evaluate(self, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `ModelRunner`."""
        for number, x_BxT, y_BxT in batches:
            sums = self.replica.evaluate(x_BxT, y_BxT)
            if self._speaks:
                totals.add(number, sums)

    def logits(self, x_1xT: np.ndarray) -> np.ndarray:
        """As in `ModelRunner`."""
        logits_TxV: np.ndarray = self._inference.outputs(x_1xT)[0]
        return logits_TxV

    def outputs(self, x_BxT: np.ndarray) -> np.ndarray:
        """As in `ModelRunner`."""
        return self._inference.outputs(x_BxT)

    def cached_forward(self) -> CachedForward:
        """As in `ModelRunner`."""
        return self._inference.cached_forward()


def outputs_by_row(runner: ModelRunner, x_BxT: np.ndarray) -> np.ndarray:
    """`ModelRunner.outputs` of a runner that computes one row at a time; a collective of its ranks."""
    return np.stack([runner.logits(x_1xT) for x_1xT in x_BxT[:, None]])
