"""Weights of which a rank holds a part, beginning with the values they have in the whole layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import keras
import tensorflow as tf

from tf_dist.errors import UsageError
from tf_dist.layers.collectives import keep_order
from tf_dist.parallel.parts import Part

# From a weight's name and its shape in the whole layer to this rank's part; None: it is not divided.
PartOf = Callable[[str, tuple[int, ...]], Part | None]


class PartInitializer(keras.initializers.Initializer):
    """Makes the whole value and takes a part of it.

    So a divided layer begins as the whole one does: an initializer's seed is drawn when it is made, not when
    it is called, and the value depends on the whole shape. For a moment the whole weight is in memory.

    Args:
        whole: initializer of the whole weight.
        part: of this rank.
    """

    def __init__(self, whole: Callable[..., Any], part: Part) -> None:
        self.whole, self.part = whole, part

    def __call__(self, shape: Any, dtype: Any = None, **kwargs: Any) -> Any:
        """Return the part, of its own shape, whatever ``shape`` is."""
        value = self.whole(self.part.whole, dtype=dtype, **kwargs)
        # Not Part.take: Keras may be tracing a graph, where there are no arrays.
        return tf.concat(self.part.stretches_of(value), axis=self.part.axis)


def divide(layer: keras.layers.Layer, part_of: PartOf) -> None:
    """Let the weights that a layer will make be this rank's parts of them.

    Keras's own ``build`` then does the rest: names, order and initial values are those of the whole layer.

    Args:
        layer: not built yet.
        part_of: see `PartOf`.

    Raises:
        UsageError: later, when a divided weight has a constraint, which would have to see all of it.
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
    """Mark a layer that talks to other ranks when it is called: XLA cannot compile it, and order counts."""
    keep_order()
    layer.tf_dist_talks = True
    layer.supports_jit = False  # so that `model.compile` does not try
