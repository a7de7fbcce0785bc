"""BatchNormalization over the global batch: moments over the rows of all ranks (Ioffe and Szegedy 2015).

Each rank by itself would normalize by its own rows, which is another model than that of one process, and
would keep its own moving averages. Inside of a `step_scope`, sums and counts are summed over the ranks,
for every `keras.layers.BatchNormalization`, whether it says ``synchronized`` or not: two exchanges of one
number for each channel on the way forward, two on the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import keras
import tensorflow as tf

from tf_dist.keras_fit.names import unnumbered
from tf_dist.keras_fit.step_scope import active


def install() -> None:
    """Patch Keras, once; any further call changes nothing."""
    layer = keras.layers.BatchNormalization
    if not hasattr(layer._moments, "__wrapped__"):
        layer._moments = _global_moments(layer._moments)


def _global_moments(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def moments(self: Any, inputs: Any, mask: Any) -> Any:
        scope = active()
        if scope is None:
            return original(self, inputs, mask)
        axes, epsilon = self._reduction_axes, 0.0
        weight = tf.ones_like(inputs)
        if mask is not None:
            weight = tf.broadcast_to(tf.cast(mask, inputs.dtype)[..., None], tf.shape(inputs))
            epsilon = keras.config.epsilon()  # as Keras has it with a mask
        weight = scope.if_any(weight)
        count, total = tf.reduce_sum(weight, axes), tf.reduce_sum(inputs * weight, axes)
        sums = scope.reduction.sum(tf.stack([count, total]), f"the mean of {unnumbered(self.path)}")
        count, mean = sums[0] + epsilon, tf.math.divide_no_nan(sums[1], sums[0] + epsilon)
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        squares = tf.reduce_sum(tf.square(inputs - tf.reshape(mean, shape)) * weight, axes)
        squares = scope.reduction.sum(squares, f"the variance of {unnumbered(self.path)}")
        return mean, tf.math.divide_no_nan(squares, count)

    return moments
