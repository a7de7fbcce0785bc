"""`Record`: what a rank does and has done, in plain memory, where its watchdog thread looks now and then."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple


class Pace(NamedTuple):
    """Of training so far. own_s: seconds of its steps outside collectives. units: of work, in all steps."""

    steps: int = 0
    own_s: float = 0.0
    units: int = 0


@dataclass
class Record:
    """What a rank has spent on talking, through a Comm and all that were made of it (`Comm.grid`).

    Attributes:
        comm_s, wait_s, sent_bytes, waiting: see `Comm`.
        step: under way, counted from 1; 0: none has begun.
        pace: of the steps that have ended.
    """

    comm_s: float = 0.0
    wait_s: float = 0.0
    sent_bytes: int = 0
    waiting: tuple[str, float] | None = None
    step: int = 0
    pace: Pace = Pace()
    _since: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def begin_step(self, step: int) -> None:
        """A training step begins, counted from 1."""
        if not self.step:
            self._since = (time.monotonic(), self.comm_s + self.wait_s)
        self.step = step

    def end_step(self, units: int) -> None:
        """It has ended. What was done since the last one, in callbacks for instance, belongs to it.

        Args:
            units: micro-batches, or batches, that this rank has done in it. 0: its time is not to be compared
                with that of other ranks.
        """
        now = (time.monotonic(), self.comm_s + self.wait_s)
        own_s = now[0] - self._since[0] - (now[1] - self._since[1])
        steps, spent_s, done = self.pace
        self.pace = Pace(steps + 1, spent_s + own_s, done + units)  # at once: another thread reads it
        self._since = now

    def next_step(self) -> None:
        """Where nobody says when steps begin and end: they meet at this point."""
        if self.step:
            self.end_step(1)
        self.begin_step(self.step + 1)
