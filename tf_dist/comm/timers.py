"""`CommTimers`: counters and times of one rank, in plain memory, which its watchdog thread samples."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple


class WorkRate(NamedTuple):
    """Training so far. own_s: seconds of its steps outside collectives. units: work items, over all steps."""

    steps: int = 0
    own_s: float = 0.0
    units: int = 0


@dataclass
class CommTimers:
    """Communication counters of one rank, shared by a Comm and all Comms derived from it (`Comm.grid`).

    Attributes:
        comm_s, wait_s, sent_bytes, waiting: see `Comm`.
        step: the current step, counted from 1; 0 before the first.
        pace: rate of the completed steps.
    """

    comm_s: float = 0.0
    wait_s: float = 0.0
    sent_bytes: int = 0
    waiting: tuple[str, float] | None = None
    step: int = 0
    pace: WorkRate = WorkRate()
    _since: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def begin_step(self, step: int) -> None:
        """Start a training step, counted from 1."""
        if not self.step:
            self._since = (time.monotonic(), self.comm_s + self.wait_s)
        self.step = step

    def end_step(self, units: int) -> None:
        """Finish the step. Time since the previous step (callbacks, for instance) counts towards it.

        Args:
            units: micro-batches, or batches, that this rank processed in it. 0: exclude its time from the
                comparison between ranks.
        """
        now = (time.monotonic(), self.comm_s + self.wait_s)
        own_s = now[0] - self._since[0] - (now[1] - self._since[1])
        steps, spent_s, done = self.pace
        self.pace = WorkRate(steps + 1, spent_s + own_s, done + units)  # atomic: another thread reads it
        self._since = now

    def next_step(self) -> None:
        """Mark a step boundary where no caller marks the start and the end: ranks synchronize here."""
        if self.step:
            self.end_step(1)
        self.begin_step(self.step + 1)
