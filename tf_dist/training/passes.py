"""What a rank does with the micro-batches of a step: forward and backward, evaluation, logits.

`WholePasses` is the plain way: the whole model, one micro-batch after another. Where ranks share the layers
of a model (`tf_dist.training.pipeline`) the same micro-batches go from rank to rank.

Legend: B rows of a micro-batch, T tokens, V vocabulary, P parameters of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from tf_dist.parallel.buckets import Overlap
from tf_dist.parallel.totals import Totals
from tf_dist.parallel.tree import BlockSum
from tf_dist.training.hooked import Overlapping
from tf_dist.training.replica import Replica


class MicroBatch(NamedTuple):
    """Rows of a global batch: the number of the micro-batch; token ids and targets, (B, T) int32."""

    number: int
    x_BxT: np.ndarray
    y_BxT: np.ndarray


class Passes(Protocol):
    """How gradients are made of micro-batches on this rank.

    by_rank: whether `again` gives what this rank alone has made, and not its part of a sum.
    """

    by_rank: bool

    @property
    def said(self) -> str:
        """A line for people, or nothing."""

    def train(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """Forward and backward of this rank's micro-batches, in their order; adds to the rank's sums.

        Args:
            step: with the number of the micro-batch and the seed all that dropout depends on.
            batches: of this rank's place along the data axis.
            totals: takes losses and counts, on ranks where `Mesh.speaks`.
        """

    def terms(self) -> list[np.ndarray]:
        """The sums of gradients of this rank, (P,) float32 each, for `Comm.allreduce_terms`."""

    def again(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> Iterator[np.ndarray]:
        """The gradients of a step that was taken, once more, to be looked at; a collective, to its end.

        Arguments are those of `train`. Each is used before the next one is asked for, and may be written to.
        """

    def evaluate(self, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """The losses and counts of `train`, without dropout and without a gradient."""

    def logits(self, x_1xT: np.ndarray) -> np.ndarray:
        """The logits (T, V) of one row, on every rank; a collective."""


class WholePasses:
    """A rank with the whole depth of the model.

    Args:
        replica: its model.
        micro_batches: numbers of this rank's micro-batches, in order.
        sums: takes a gradient of each.
        overlap: whether gradients leave during the backward pass.
        speaks: whether this rank counts losses.
    """

    by_rank = True

    def __init__(
        self, replica: Replica, micro_batches: Sequence[int], sums: BlockSum, overlap: Overlap, speaks: bool
    ) -> None:
        self.replica, self.sums, self._speaks = replica, sums, speaks
        self.overlap = Overlapping(replica, sums, micro_batches, overlap)
        self._logits: Callable[..., Any] | None = None

    @property
    def said(self) -> str:
        """As in `Passes`."""
        return self.overlap.said

    def train(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `Passes`."""
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

    def terms(self) -> list[np.ndarray]:
        """As in `Passes`; they may be on their way."""
        return self.overlap.terms()

    def again(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> Iterator[np.ndarray]:
        """As in `Passes`: the gradient of each micro-batch, none of which leaves."""
        for number, x_BxT, y_BxT in batches:
            yield np.array(self.replica.gradients(x_BxT, y_BxT, (step, number))[0])

    def evaluate(self, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `Passes`."""
        for number, x_BxT, y_BxT in batches:
            sums = self.replica.evaluate(x_BxT, y_BxT)
            if self._speaks:
                totals.add(number, sums)

    def logits(self, x_1xT: np.ndarray) -> np.ndarray:
        """As in `Passes`."""
        if self._logits is None:
            model = self.replica.model
            self._logits = tf.function(lambda x: tf.cast(model(x, training=False)[0], tf.float32))
        return np.asarray(self._logits(tf.convert_to_tensor(x_1xT, tf.int32)))
