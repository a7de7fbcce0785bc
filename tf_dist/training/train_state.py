"""`TrainState`: the state of a training besides weights and optimizer, in one place.

All snapshots store `TrainState.state_dict`, and a new counter is a new field here. Data order and dropout are
functions of (seed, step), and need no state.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tf_dist.checkpoint.sharded_state import ShardedState
from tf_dist.comm.transport.base import Comm

# Losses with which a spike is compared.
WINDOW = 64


@dataclass
class SkippedSteps:
    """Steps skipped for a non-finite gradient: so far, and consecutive ones up to now."""

    total: int = 0
    in_a_row: int = 0


@dataclass
class SpikeWindow:
    """Window of losses, and skipped batches.

    skips: pairs (step, batches): from this step on, counted from 0, this many batches are skipped.
    """

    skips: list[list[int]] = field(default_factory=list)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def batch_of(self, step: int) -> int:
        """The number of the batch that a step takes, both counted from 0."""
        return step + sum(count for first, count in self.skips if first <= step)


@dataclass
class MetricsAccumulator:
    """The current row of ``metrics.jsonl`` so far; the same on every rank.

    loss_sum: over the ``finite`` tokens of steps with a finite loss. tokens, steps: of all.
    last: the previous row, once it was handed to the writer.
    """

    loss_sum: float = 0.0
    finite: float = 0.0
    tokens: float = 0.0
    steps: int = 0
    last: dict[str, Any] = field(default_factory=dict)

    def add(self, loss: float, tokens: float) -> None:
        """Count a step."""
        if math.isfinite(loss):  # of a skipped step it may be anything
            self.loss_sum += loss * tokens
            self.finite += tokens
        self.tokens += tokens
        self.steps += 1

    def begin_row(self) -> None:
        """Reset the sums, which are in a row now."""
        self.loss_sum, self.finite, self.tokens, self.steps = 0.0, 0.0, 0.0, 0

    @property
    def facts(self) -> list[float]:
        """What is kept with a checkpoint."""
        return [self.loss_sum, self.finite, self.tokens, self.steps]


@dataclass
class TrainState:
    """Position and counters of a training: all that its future depends on besides weights and optimizer.

    Attributes:
        step: optimizer steps taken so far.
        tokens: target tokens trained on so far.
        tokens_synchronized: those of all ranks at their last synchronization.
        elapsed_s: seconds spent in training, over all resumed runs.
        stopped: whether the ranks have agreed to stop.
        fitted: the step at which the last `Trainer.fit` ended, from which the next one counts.
        skipped: steps with a non-finite gradient.
        spikes: window of losses, and skipped batches.
        row: the current row of metrics.
        val_loss: of the last validation, after step ``val_loss_step``; None before the first.
        xla: whether XLA compiles forward and backward; None: not decided yet.
        lost: failed ranks, as numbered when the job began.
    """

    step: int = 0
    tokens: int = 0
    tokens_synchronized: int = 0
    elapsed_s: float = 0.0
    stopped: bool = False
    fitted: int = 0
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    spikes: SpikeWindow = field(default_factory=SpikeWindow)
    row: MetricsAccumulator = field(default_factory=MetricsAccumulator)
    val_loss: float | None = None
    val_loss_step: int | None = None
    xla: bool | None = None
    lost: list[int] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """JSON values to be kept with weights and optimizer, by the names that checkpoints have for them."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
            "tuned": {"xla": bool(self.xla)},
            "bad_steps": [self.skipped.total, self.skipped.in_a_row],
            "spikes": {
                "skips": [list(pair) for pair in self.spikes.skips],
                "losses": list(self.spikes.losses),
            },
            "row": self.row.facts,
            "last_row": self.row.last,
            "val_loss": self.val_loss,
            "val_loss_step": self.val_loss_step,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Be where a training was; what older checkpoints do not have is as it was in their versions."""
        self.step, self.elapsed_s, self.fitted = saved["step"], saved["elapsed_s"], 0
        self.count_from(saved["tokens"])
        self.xla = saved.get("tuned", {"xla": False})["xla"]  # there was no XLA in the first checkpoints
        self.skipped.total, self.skipped.in_a_row = saved.get("bad_steps", (0, 0))
        spikes = saved.get("spikes", {})
        self.spikes.skips = [list(pair) for pair in spikes.get("skips", [])]
        self.spikes.losses = deque(spikes.get("losses", []), maxlen=WINDOW)
        loss_sum, finite, tokens, steps = saved.get("row", (0.0, 0.0, 0.0, 0))
        row, last = self.row, dict(saved.get("last_row", {}))
        row.loss_sum, row.finite, row.tokens, row.steps, row.last = loss_sum, finite, tokens, int(steps), last
        self.val_loss, self.val_loss_step = saved.get("val_loss"), saved.get("val_loss_step")

    def count_from(self, tokens: int) -> None:
        """Go on from so many tokens of all ranks."""
        self.tokens = self.tokens_synchronized = tokens

    def rewind(self, saved: Mapping[str, Any]) -> None:
        """Return to an earlier step of this training, from its `state_dict`, to repeat steps.

        Only `counters` change: losses and rows of metrics have seen these steps, and do not see them twice.
        """
        self.counters = [saved["step"], saved["tokens"], *saved["bad_steps"]]

    # Changed by the step itself, before its last collective is over; callbacks change the rest.

    @property
    def counters(self) -> list[int]:
        """Counters that a step changes: exchanged with the weights in a recovery, restored by a replay."""
        return [self.step, self.tokens, self.skipped.total, self.skipped.in_a_row]

    @counters.setter
    def counters(self, counted: list[int]) -> None:
        self.step, tokens, self.skipped.total, self.skipped.in_a_row = counted
        self.count_from(tokens)


class Stateful(Protocol):
    """What snapshots are made of, and given back to: a `tf_dist.training.trainer.Trainer`, for one."""

    comm: Comm
    state: TrainState

    @property
    def when_lost(self) -> list[Callable[[], None]]:
        """Called on every rank that is left, after each death."""

    def whole(self) -> ShardedState:
        """Weights and optimizer, of which ranks hold parts; a collective."""

    def gather_state(self) -> None:
        """Leave nothing on a rank that a snapshot could not keep; a collective."""
