"""Work that a master deals out: which part of which global batch a worker takes next.

A global batch is cut into *units*, neighbouring micro-batches that make one subtree of the tree over all of
them (`tf_dist.parallel.tree`). Workers take the next unit when they are ready, so a slow one takes fewer. How
far they may run ahead is bounded (stale-synchronous, Ho et al. 2013): units of batch t are dealt out only
when all of batch t - 1 - S are done. With S = 0 that is one batch at a time.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Unit(NamedTuple):
    """A part of a global batch: its step, and its number in that step."""

    step: int
    number: int


def micro_batches_of_a_unit(micro_batches: int, workers: int) -> int:
    """The largest power of two that divides a global batch into at least one unit for each worker, if any.

    Units of that size are subtrees, and the tree over units is the top of the tree over micro-batches.
    """
    size = 1
    while micro_batches % (2 * size) == 0 and micro_batches // (2 * size) >= workers:
        size *= 2
    return size


class Dealer:
    """Deals out units in order, and knows which are done.

    Args:
        units: of each step.
        staleness: S.
        first: the step with which to begin.

    Attributes:
        done: all steps before this one are done.
    """

    def __init__(self, units: int, staleness: int, first: int = 0) -> None:
        self.units, self.staleness, self.done = units, staleness, first
        self._next = Unit(first, 0)
        self._open: dict[int, set[int]] = {}
        self._returned: deque[Unit] = deque()

    @property
    def begun(self) -> int:
        """The step after the last one of which something was dealt out."""
        return self._next.step + (self._next.number > 0)

    def deal(self, limit: int) -> Unit | None:
        """The next unit of a step before ``limit``; None where nobody may begin one now."""
        if self._returned:
            return self._returned.popleft()
        unit = self._next
        if unit.step >= limit or unit.step - self.done > self.staleness:
            return None
        self._open.setdefault(unit.step, set(range(self.units)))
        last = unit.number == self.units - 1
        self._next = Unit(unit.step + 1, 0) if last else Unit(unit.step, unit.number + 1)
        return unit

    def give_back(self, unit: Unit) -> None:
        """Let somebody else take a unit, of which whoever had it will tell nothing any more."""
        self._returned.append(unit)

    def finish(self, unit: Unit) -> None:
        """Note that a unit is done."""
        self._open[unit.step].remove(unit.number)
        while self.done in self._open and not self._open[self.done]:
            del self._open[self.done]
            self.done += 1
