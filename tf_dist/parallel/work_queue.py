"""Work queue of a parameter server: which part of which global batch a worker processes next.

A global batch is split into *work items*, consecutive micro-batches that form one subtree of the tree over
all of them (`tf_dist.parallel.reduction_tree`). Workers take the next item when they are ready, so a slow one
takes fewer. Staleness is bounded (stale-synchronous parallel, Ho et al. 2013): items of batch t are assigned
only when all of batch t - 1 - S are done. With S = 0 that is one batch at a time.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class WorkItem(NamedTuple):
    """A part of a global batch: its step, and its number in that step."""

    step: int
    number: int


def micro_batches_of_an_item(micro_batches: int, workers: int) -> int:
    """The largest power of two that divides a global batch into at least one work item per worker, if any.

    Items of that size are subtrees, and the tree over items is the top of the tree over micro-batches.
    """
    size = 1
    while micro_batches % (2 * size) == 0 and micro_batches // (2 * size) >= workers:
        size *= 2
    return size


class WorkQueue:
    """Assigns work items in order, and tracks which are done.

    Args:
        units: work items of each step.
        staleness: S.
        first: the first step.

    Attributes:
        done: all steps before this one are done.
    """

    def __init__(self, units: int, staleness: int, first: int = 0) -> None:
        self.units, self.staleness, self.done = units, staleness, first
        self._next = WorkItem(first, 0)
        self._open: dict[int, set[int]] = {}
        self._returned: deque[WorkItem] = deque()

    @property
    def begun(self) -> int:
        """The step after the last one of which an item was assigned."""
        return self._next.step + (self._next.number > 0)

    def next_item(self, limit: int) -> WorkItem | None:
        """The next item of a step before ``limit``; None if none may start now."""
        if self._returned:
            return self._returned.popleft()
        unit = self._next
        if unit.step >= limit or unit.step - self.done > self.staleness:
            return None
        self._open.setdefault(unit.step, set(range(self.units)))
        last = unit.number == self.units - 1
        self._next = WorkItem(unit.step + 1, 0) if last else WorkItem(unit.step, unit.number + 1)
        return unit

    def give_back(self, unit: WorkItem) -> None:
        """Return an item of a failed worker to the queue."""
        self._returned.append(unit)

    def finish(self, unit: WorkItem) -> None:
        """Mark an item as done."""
        self._open[unit.step].remove(unit.number)
        while self.done in self._open and not self._open[self.done]:
            del self._open[self.done]
            self.done += 1
