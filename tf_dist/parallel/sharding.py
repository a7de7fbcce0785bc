"""Sharding: which elements of a global array a rank holds, if a layer is partitioned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tf_dist.partition import share


@dataclass(frozen=True)
class ShardSpec:
    """Slices of a global array along one axis, concatenated; or all of it.

    whole: the global shape. axis: along which it is partitioned. ranges: what this rank holds of it;
    None: everything. A matrix for queries, keys and values, (D, 3 D), has three ranges of columns for a rank.
    """

    whole: tuple[int, ...]
    axis: int = 0
    ranges: tuple[range, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the shard."""
        if self.ranges is None:
            return self.whole
        return (*self.whole[: self.axis], sum(map(len, self.ranges)), *self.whole[self.axis + 1 :])

    @property
    def pairs(self) -> list[list[int]] | None:
        """Start and stop of each range, as JSON and messages have them."""
        return None if self.ranges is None else [[one.start, one.stop] for one in self.ranges]

    def take(self, whole: Any) -> Any:
        """The shard of a global array; copied, unless it is all of it."""
        return whole if self.ranges is None else np.concatenate(self.slices_along(whole), axis=self.axis)

    def slices_along(self, whole: Any) -> list[Any]:
        """The slice of each range, of an array or a tensor; to be concatenated."""
        return [whole] if self.ranges is None else [whole[self._index(one)] for one in self.ranges]

    def put(self, whole: np.ndarray, part: np.ndarray) -> None:
        """Write the shard to its position in a global array."""
        if self.ranges is None:
            whole[...] = part
            return
        start = 0
        for one in self.ranges:
            held = range(start, start + len(one))
            whole[self._index(one)] = part[self._index(held)]
            start = held.stop

    def _index(self, stretch: range) -> tuple[slice, ...]:
        return (*[slice(None)] * self.axis, slice(stretch.start, stretch.stop))


def stretches(groups: int, length: int, rank: int, size: int) -> tuple[range, ...]:
    """A rank's `share` of each of ``groups`` blocks of ``length``: gates of an LSTM, or q, k and v."""
    mine = share(length, rank, size)
    return tuple(range(g * length + mine.start, g * length + mine.stop) for g in range(groups))


def part_of(variable: Any) -> ShardSpec:
    """The sharding of a Keras variable; the full array, unless a layer has set another."""
    return getattr(variable, "tf_dist_part", None) or ShardSpec(tuple(variable.shape))
