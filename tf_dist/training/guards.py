"""`StepGuard`: a policy that inspects each step of a training, and decides whether the step counts.

Guards see the state of the training, snapshots and ranks, never the Trainer. `Trainer.train_step` interprets
their verdicts. A guard that ends the training, or rolls it back to a checkpoint, raises an error instead: the
run's files belong to the caller of `Trainer.fit`, which the error leaves.

Recovery from failed ranks is no guard: `InPlaceRecovery` covers all phases of a training, not only its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import NamedTuple

from tf_dist.parallel.totals import Totals
from tf_dist.runners.runner import MicroBatch, ModelRunner
from tf_dist.training.train_state import TrainState


class Verdict(Enum):
    """Decision about a step: OK, it counts; RETRY, repeat it from the state that the guard has repaired."""

    OK = auto()
    RETRY = auto()


class StepResult(NamedTuple):
    """Outcome of a step, before it counts.

    norm: of the mean gradient. taken: False if no weight has changed; the same on all ranks. totals: of all
    ranks. runner, batches: what computed this rank's gradients, and from which micro-batches.
    """

    norm: float
    taken: bool
    totals: Totals
    runner: ModelRunner
    batches: Callable[[], Sequence[MicroBatch]]


class StepGuard:
    """Base class of guards. Its methods are no-ops, and are called on all ranks."""

    def before(self, state: TrainState) -> None:
        """Inspect the state before a step, also before one that begins again without failed ranks."""

    def after(self, state: TrainState, result: StepResult) -> Verdict:
        """Inspect a step that was taken or skipped, number ``state.step + 1``, and may still be repeated."""
        return Verdict.OK

    def settle(self, state: TrainState, logs: Mapping[str, float]) -> None:
        """Inspect a step that counts on all ranks, number ``state.step``, and is not repeated."""
