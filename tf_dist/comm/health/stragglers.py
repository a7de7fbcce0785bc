"""Straggler detection: ranks consistently slower than the others, and their cost, from `WorkRate`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from tf_dist.comm.timers import WorkRate

# A window has at least this many steps, in which the slowest rank has spent this many seconds: shorter ones
# are noise.
WINDOW_STEPS = 5
WINDOW_S = 0.2
# Relative to the median of the others' time per work item.
RATIO = 1.5
# The wait of the others must be at least this fraction of the slow rank's own time to be reported.
LEAST_PART = 0.1
# A rank is reported when it was slow in this many consecutive windows.
WINDOWS = 2


class Straggler(NamedTuple):
    """A slow rank. ratio: to the median of the others, per micro-batch. ms: wait of the others in a step."""

    rank: int
    step: int
    ratio: float
    ms: float


class Stragglers:
    """Compares the work rates of ranks, window by window."""

    def __init__(self) -> None:
        self._since: dict[int, WorkRate] = {}
        self._slow: dict[int, int] = {}

    def look(self, paces: Mapping[int, WorkRate]) -> list[Straggler]:
        """Return the ranks that were slow in the last windows; none before a window is full.

        Args:
            paces: of the ranks that train together; a rank without work of its own has 0 units.
        """
        if self._since.keys() != paces.keys():
            self._since, self._slow = dict(paces), {}
            return []
        spent = {rank: _between(self._since[rank], pace) for rank, pace in paces.items()}
        if not spent or min(one.steps for one in spent.values()) < WINDOW_STEPS:
            return []
        if max(one.own_s for one in spent.values()) < WINDOW_S:
            return []
        self._since = dict(paces)
        slow = _slow_ones(spent, max(pace.steps for pace in paces.values()))
        self._slow = {one.rank: self._slow.get(one.rank, 0) + 1 for one in slow}
        return [one for one in slow if self._slow[one.rank] >= WINDOWS]


def _between(before: WorkRate, now: WorkRate) -> WorkRate:
    return WorkRate(now.steps - before.steps, now.own_s - before.own_s, now.units - before.units)


def _slow_ones(spent: Mapping[int, WorkRate], step: int) -> list[Straggler]:
    """The ranks that were slow in one window."""
    working = {rank: one for rank, one in spent.items() if one.units > 0}
    found = []
    for rank, one in working.items():
        others = [other for index, other in working.items() if index != rank]
        if not others:
            continue
        ratio = (one.own_s / one.units) / max(statistics.median(o.own_s / o.units for o in others), 1e-9)
        in_step_s = one.own_s / one.steps
        waited_s = in_step_s - statistics.median(other.own_s / other.steps for other in others)
        if ratio >= RATIO and waited_s >= LEAST_PART * in_step_s:
            found.append(Straggler(rank, step, round(ratio, 2), round(1e3 * waited_s, 1)))
    return found
