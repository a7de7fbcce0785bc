"""Partitioned weights: a rank's shard, initialized with the values that it has in the global weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import keras
import tensorflow as tf

from tf_dist.errors import UsageError
from tf_dist.layers.mappings import keep_order
from tf_dist.parallel.sharding import ShardSpec

# Maps a weight's name and global shape to this rank's shard; None: not partitioned.
PartOf = Callable[[str, tuple[int, ...]], ShardSpec | None]


class PartInitializer(keras.initializers.Initializer):
    """Initializes the global weight and takes a shard of it.

    So a partitioned layer starts with the values of the unpartitioned one: an initializer's seed is drawn
    when it is created, not when it is called, and the value depends on the global shape. The global weight is
    in memory temporarily.

    Args:
        whole: initializer of the global weight.
        part: of this rank.
    """

    def __init__(self, whole: Callable[..., Any], part: ShardSpec) -> None:
        self.whole, self.part = whole, part

    def __call__(self, shape: Any, dtype: Any = None, **kwargs: Any) -> Any:
        """Return the shard, of its own shape, whatever ``shape`` is."""
        value = self.whole(self.part.whole, dtype=dtype, **kwargs)
        # Not ShardSpec.take: Keras may be tracing a graph, where there are no arrays.
        return tf.concat(self.part.slices_along(value), axis=self.part.axis)


def divide(layer: keras.layers.Layer, part_of: PartOf) -> None:
    """Make a layer create only this rank's shards of its weights.

    Keras's own ``build`` does the rest: names, order and initial values are those of the unpartitioned layer.

    Args:
        layer: not built yet.
        part_of: see `PartOf`.

    Raises:
        UsageError: on every rank, when it is built: a partitioned weight has a constraint, which would need
            all of it.
    """
    add_weight = layer.add_weight

    @wraps(add_weight)
    def add_part(*, shape: Any = None, initializer: Any = None, name: Any = None, **kwargs: Any) -> Any:
        part = part_of(name, tuple(shape or ()))
        if part is None:
            return add_weight(shape=shape, initializer=initializer, name=name, **kwargs)
        if kwargs.get("constraint") is not None:
            raise UsageError(
                f"{layer.name}/{name} is divided among ranks, so a constraint would see a part of it only: "
                "leave it out"
            )
        whole = keras.initializers.get(initializer or "glorot_uniform")
        variable = add_weight(shape=part.shape, initializer=PartInitializer(whole, part), name=name, **kwargs)
        variable.tf_dist_part = part
        return variable

    layer.add_weight = add_part


def talks(layer: keras.layers.Layer) -> None:
    """Mark a layer that communicates when it is called: XLA cannot compile it, and order matters."""
    keep_order()
    layer.tf_dist_talks = True
    layer.supports_jit = False  # so that `model.compile` does not try
