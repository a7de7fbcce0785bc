"""Losses that jump, and data that is passed over: the rule of PaLM (Chowdhery et al. 2022, section 5.1).

A step is a spike where its loss exceeds

    median + factor * max(1.4826 * MAD, 1 % of the median)

of the last `WINDOW` losses before it, where MAD is the median distance from the median. With
``--on-spike rollback`` the run goes back to a checkpoint of at least `BEFORE` steps before, and the batches
from there on, past the spike and some more, are passed over: it takes a certain state *and* certain data to
make one.

The loss is the same on all ranks, so all decide the same. What is passed over, and the losses that are
looked at, are facts of a checkpoint, so a run that is resumed has the same order of data and sees the same
spikes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from tf_dist.errors import NumericError, TfDistError, UsageError
from tf_dist.parallel.totals import ADVICE

WINDOW, BEFORE = 64, 20
# Times that a run goes back to one checkpoint.
MOST_ROLLBACKS = 5
CHOICES = ("off", "warn", "rollback")


class Spike(TfDistError, ArithmeticError):
    """The loss has jumped, and the run wants to go back; raised on all ranks.

    Attributes:
        step: taken last, counted from 1, whose loss it was.
    """

    exit_code = NumericError.exit_code

    def __init__(self, step: int, what: str) -> None:
        super().__init__(what)
        self.step = step


class Spikes:
    """Looks at losses, and knows which batch a step takes.

    Args:
        on_spike: "off", "warn" or "rollback".
        factor: see above.
        skip: batches that are passed over after that of the spike.

    Attributes:
        skips: pairs (step, batches): from this step on, counted from 0, so many batches are passed over.
        rollbacks: what was done, for ``status.json``.

    Raises:
        UsageError: an unknown choice, or a value that cannot be.
    """

    def __init__(self, on_spike: str = "off", factor: float = 10.0, skip: int = 100) -> None:
        if on_spike not in CHOICES:
            raise UsageError(f"on_spike is {on_spike!r}: choose one of {', '.join(CHOICES)}")
        if factor <= 0 or skip < 0:
            raise UsageError(f"spike_factor {factor} must be above 0, and spike_skip {skip} at least 0")
        self.on_spike, self.factor, self.skip = on_spike, factor, skip
        self.skips: list[list[int]] = []
        self.rollbacks: list[dict[str, int]] = []
        self._losses = deque[float](maxlen=WINDOW)

    def batch_of(self, step: int) -> int:
        """The number of the batch that a step takes, both counted from 0."""
        return step + sum(count for first, count in self.skips if first <= step)

    def limit(self) -> float:
        """What the next loss must not exceed; infinity where too few were seen."""
        if len(self._losses) < WINDOW:
            return math.inf
        middle = median(self._losses)
        away = median(abs(loss - middle) for loss in self._losses)
        return middle + self.factor * max(1.4826 * away, 0.01 * abs(middle))

    def look(self, step: int, loss: float) -> str:
        """Look at the loss of a step, counted from 1.

        Returns:
            What to warn of, or nothing.

        Raises:
            Spike: it has jumped, and the run is to go back.
        """
        if self.on_spike == "off" or not math.isfinite(loss):
            return ""
        limit = self.limit()
        if loss <= limit:
            self._losses.append(loss)
            return ""
        what = f"step {step}: the loss has jumped to {loss:.4f}, above {limit:.4f}"
        if self.on_spike == "rollback":
            raise Spike(step, what)
        self._losses.append(loss)
        return what

    def go_back(self, spike: int, step: int, saved: Mapping[str, Any]) -> int:
        """The state is that of a checkpoint again: pass over its next batches, to those after the spike.

        Args:
            spike: its step, counted from 1.
            step: of the checkpoint.
            saved: the facts of it.

        Returns:
            The batches that are passed over from here on.

        Raises:
            NumericError: there was a spike after this checkpoint too often.
        """
        if sum(one["to"] == step for one in self.rollbacks) >= MOST_ROLLBACKS:
            raise NumericError(
                f"the loss has jumped again in step {spike}, after {MOST_ROLLBACKS} times in which batches "
                f"after step {step} were passed over: it is not the data. {ADVICE}"
            )
        first = self.batch_of(spike - 1) + 1 + self.skip
        self.facts = saved
        count = first - self.batch_of(step)
        self.skips.append([step, count])
        self.rollbacks.append({"spike": spike, "to": step, "batches": count})
        return count

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"skips": self.skips, "losses": list(self._losses)}

    @facts.setter
    def facts(self, saved: Mapping[str, Any]) -> None:
        """Go on as it was then; older checkpoints know of nothing."""
        self.skips = [list(pair) for pair in saved.get("skips", [])]
        self._losses = deque(saved.get("losses", []), maxlen=WINDOW)
