"""`TensorShard`: the elements of a global weight or optimizer tensor that one rank holds."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tf_dist.parallel.sharding import ShardSpec


class TensorShard(NamedTuple):
    """Elements ``start`` to ``stop`` of a (shard of a) tensor, flat, that one rank holds.

    part: of the global tensor. read: returns them as a 1-D array. write: sets them.
    """

    part: ShardSpec
    start: int
    stop: int
    read: Callable[[], np.ndarray]
    write: Callable[[np.ndarray], None]


def variable_shard(variable: Any, part: ShardSpec) -> TensorShard:
    """All of a variable, as a shard of the global tensor."""

    def write(values: np.ndarray) -> None:
        variable.assign(values.reshape(part.shape))

    return TensorShard(part, 0, prod(part.shape), lambda: np.asarray(variable.value).reshape(-1), write)


def array_shard(array: np.ndarray, part: ShardSpec) -> TensorShard:
    """All of a flat array, read and written in place."""
    return TensorShard(part, 0, array.size, lambda: array, lambda values: np.copyto(array, values))
