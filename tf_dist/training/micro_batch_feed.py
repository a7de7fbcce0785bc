"""`MicroBatchFeed`: the micro-batches of each step, prefetched for this rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tf_dist.data.prefetch import Prefetcher
from tf_dist.data.rows import Rows
from tf_dist.data.sampler import Sampler
from tf_dist.runners.runner import MicroBatch
from tf_dist.training.train_state import TrainState


class MicroBatchFeed:
    """Cuts the global batch of a step into micro-batches.

    Args:
        state: knows which global batches are skipped.
        rows: B, of a micro-batch.
        mine: indices of the micro-batches of this rank; replaced by `reassign` when ranks have failed.
    """

    def __init__(self, state: TrainState, rows: int, mine: Sequence[int]) -> None:
        self._state, self._rows, self._mine = state, rows, mine
        self._ahead: tuple[Rows, Sampler, Prefetcher[list[MicroBatch]]] | None = None

    def reassign(self, mine: Sequence[int]) -> None:
        """Feed other micro-batches from now on."""
        self._mine, self._ahead = mine, None

    def make(self, sequences: Rows, sampler: Sampler, step: int, numbers: Sequence[int]) -> list[MicroBatch]:
        """Micro-batches of a step, by index."""
        rows_G = sampler.batch(self._state.spikes.batch_of(step))
        rows = self._rows
        return [MicroBatch(k, *sequences.rows(rows_G[k * rows : (k + 1) * rows], (step, k))) for k in numbers]

    def next(self, sequences: Rows, sampler: Sampler) -> list[MicroBatch]:
        """The micro-batches of this rank for the next step; those of the step after it are prefetched."""
        if self._ahead is None or self._ahead[:2] != (sequences, sampler):
            make = partial(self.make, sequences, sampler, numbers=self._mine)
            self._ahead = sequences, sampler, Prefetcher(make)
        return self._ahead[2](self._state.step)
