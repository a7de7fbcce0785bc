"""Loss spikes, and batches that are skipped: the rule of PaLM (Chowdhery et al. 2022, section 5.1).

A step is a spike where its loss exceeds

    median + factor * max(1.4826 * MAD, 1 % of the median)

of the `WINDOW` losses before it, where MAD is the median absolute deviation. With ``--on-spike rollback`` the
run rolls back to a checkpoint at least `BEFORE` steps earlier, and skips the batches from there to the spike,
and some more: a spike needs a certain state *and* certain data.

The loss is the same on all ranks, so all decide the same. Skipped batches and the window of losses are stored
in checkpoints, so a resumed run has the same data order and detects the same spikes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.transport.base import Comm, SerialComm
from tf_dist.errors import NumericError, TfDistError, UsageError
from tf_dist.parallel.totals import ADVICE
from tf_dist.training.guards import StepGuard
from tf_dist.training.train_state import WINDOW, SpikeWindow, TrainState

LOG = logging.getLogger(__name__)
BEFORE = 20
# Rollbacks to one checkpoint.
MOST_ROLLBACKS = 5
CHOICES = ("off", "warn", "rollback")


class Spike(TfDistError, ArithmeticError):
    """The loss has jumped, and the run is to roll back; raised on all ranks.

    Attributes:
        step: of the spike, counted from 1.
    """

    exit_code = NumericError.exit_code

    def __init__(self, step: int, what: str) -> None:
        super().__init__(what)
        self.step = step


class LossSpikes(StepGuard):
    """Detects loss spikes, and decides which batches are skipped.

    Args:
        on_spike: "off", "warn" or "rollback".
        factor: as above.
        skip: batches that are skipped after that of the spike.

    Attributes:
        seen: window of losses, and skipped batches; part of a `TrainState`.
        rollbacks: so far, for ``status.json``.
        comm: all ranks, which warn of the same.

    Raises:
        UsageError: an unknown choice, or a value out of range.
    """

    def __init__(self, on_spike: str = "off", factor: float = 10.0, skip: int = 100) -> None:
        if on_spike not in CHOICES:
            raise UsageError(f"on_spike is {on_spike!r}: choose one of {', '.join(CHOICES)}")
        if factor <= 0 or skip < 0:
            raise UsageError(f"spike_factor {factor} must be above 0, and spike_skip {skip} at least 0")
        self.on_spike, self.factor, self.skip = on_spike, factor, skip
        self.seen = SpikeWindow()
        self.rollbacks: list[dict[str, int]] = []
        self.comm: Comm = SerialComm()

    def limit(self) -> float:
        """Upper bound of a loss that is no spike; infinity before the window is full."""
        if len(self.seen.losses) < WINDOW:
            return math.inf
        middle = median(self.seen.losses)
        away = median(abs(loss - middle) for loss in self.seen.losses)
        return middle + self.factor * max(1.4826 * away, 0.01 * abs(middle))

    @property
    def options(self) -> dict[str, Any]:
        """Options that must be the same on all ranks."""
        return {"on_spike": self.on_spike, "factor": self.factor, "skip": self.skip, "skips": self.seen.skips}

    def settle(self, state: TrainState, logs: Mapping[str, float]) -> None:
        """Inspect the loss of a step, and warn of a spike.

        Raises:
            Spike: on all ranks: the loss has jumped, and the run is to roll back.
        """
        if warning := self.look(state.step, logs["loss"]):
            once(LOG, self.comm).warning(warning)

    def look(self, step: int, loss: float) -> str:
        """Inspect the loss of a step, counted from 1.

        Returns:
            A warning; empty if the loss is no spike.

        Raises:
            Spike: on all ranks: the loss has jumped, and the run is to roll back.
        """
        if self.on_spike == "off" or not math.isfinite(loss):
            return ""
        limit = self.limit()
        if loss <= limit:
            self.seen.losses.append(loss)
            return ""
        what = f"step {step}: the loss has jumped to {loss:.4f}, above {limit:.4f}"
        if self.on_spike == "rollback":
            raise Spike(step, what)
        self.seen.losses.append(loss)
        return what

    def batch_after(self, spike: int) -> int:
        """The first batch that is not skipped because of a spike in this step, counted from 1."""
        return self.seen.batch_of(spike - 1) + 1 + self.skip

    def pass_over(self, spike: int, step: int, first: int) -> int:
        """After a rollback: skip the batches between the checkpoint and the end of the spike.

        Args:
            spike: its step, counted from 1.
            step: of the checkpoint.
            first: batch of the next step: `batch_after` the spike, as it was before the rollback.

        Returns:
            The number of skipped batches.

        Raises:
            NumericError: too many rollbacks to this checkpoint.
        """
        if sum(one["to"] == step for one in self.rollbacks) >= MOST_ROLLBACKS:
            raise NumericError(
                f"the loss has jumped again in step {spike}, after {MOST_ROLLBACKS} times in which batches "
                f"after step {step} were passed over: it is not the data. {ADVICE}"
            )
        count = first - self.seen.batch_of(step)
        self.seen.skips.append([step, count])
        self.rollbacks.append({"spike": spike, "to": step, "batches": count})
        return count
