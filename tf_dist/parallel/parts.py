"""Which elements of a whole array a rank holds, where a layer is divided among ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tf_dist.partition import share


@dataclass(frozen=True)
class Part:
    """Stretches of a whole array along one axis, back to back; or all of it.

    whole: the shape of the whole array. axis: along which it is divided. ranges: what this rank holds of it;
    None: everything. A matrix for queries, keys and values, (D, 3 D), has three ranges of columns for a rank.
    """

    whole: tuple[int, ...]
    axis: int = 0
    ranges: tuple[range, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is held."""
        if self.ranges is None:
            return self.whole
        return (*self.whole[: self.axis], sum(map(len, self.ranges)), *self.whole[self.axis + 1 :])

    def take(self, whole: Any) -> Any:
        """The part of an array of the whole shape; copied, where it is not all of it."""
        return whole if self.ranges is None else np.concatenate(self.stretches_of(whole), axis=self.axis)

    def stretches_of(self, whole: Any) -> list[Any]:
        """What lies between the bounds of each range, of an array or a tensor; to be put side by side."""
        return [whole] if self.ranges is None else [whole[self._index(one)] for one in self.ranges]

    def put(self, whole: np.ndarray, part: np.ndarray) -> None:
        """Write the part to its place in a whole array."""
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
    """A rank's `share` of each of ``groups`` neighbours of ``length``: gates of an LSTM, or q, k and v."""
    mine = share(length, rank, size)
    return tuple(range(g * length + mine.start, g * length + mine.stop) for g in range(groups))


def part_of(variable: Any) -> Part:
    """What a Keras variable holds of a whole one; everything, where no layer has said otherwise."""
    return getattr(variable, "tf_dist_part", None) or Part(tuple(variable.shape))
