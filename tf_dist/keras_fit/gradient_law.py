"""Gradients of a rank's objective, scaled so that their mean over ranks is that of the global batch (`Law`).

A mean over this rank's rows counts by its part of all rows. The scale is applied where differentiation
begins, in `tf.GradientTape.gradient`: gradients that cross ranks on their way, as through the global moments
of `global_batch_norm`, are then summed with the right weights. Only gradients with respect to variables are
scaled, not those that a loss itself asks for, such as a gradient penalty's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import keras
import tensorflow as tf

from tf_dist.keras_fit.step_scope import StepScope, active


def install() -> None:
    """Patch TensorFlow, once; any further call changes nothing."""
    if not hasattr(tf.GradientTape.gradient, "__wrapped__"):
        tf.GradientTape.gradient = _scaled(tf.GradientTape.gradient)


def _scaled(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def gradient(
        self: Any, target: Any, sources: Any, output_gradients: Any = None, *arguments: Any, **words: Any
    ) -> Any:
        scope = active()
        if scope is None or not _are_variables(sources):
            return original(self, target, sources, output_gradients, *arguments, **words)
        if scope.law.gradients == "mean" and output_gradients is None:
            ones = tf.nest.map_structure(tf.ones_like, target)
            output_gradients = tf.nest.map_structure(scope.row_scaled, ones)
        found = original(self, target, sources, output_gradients, *arguments, **words)
        if scope.gradient_scale == 1:
            return found
        return tf.nest.map_structure(
            lambda grad: _with_values(grad, lambda one: scope.gradient_scale * one), found
        )

    return gradient


def _are_variables(sources: Any) -> bool:
    return all(isinstance(one, tf.Variable | keras.Variable) for one in tf.nest.flatten(sources))


def _with_values(grad: Any, change: Callable[[Any], Any]) -> Any:
    """A gradient whose numbers are changed: of a tensor, of slices, or of none."""
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(change(grad.values), grad.indices, grad.dense_shape)
    return None if grad is None else change(grad)


def by_law(grads: Sequence[Any], scope: StepScope) -> list[Any]:
    """Gradients whose mean over the ranks is that of the global batch, by what the user's objective is."""
    if scope.law.gradients == "global":
        return list(grads)
    factor = scope.size if scope.law.gradients == "sum" else 1
    any_rows = scope.any_rows

    def scaled(values: Any) -> Any:
        return tf.where(any_rows, tf.cast(factor, values.dtype) * values, tf.zeros_like(values))

    return [_with_values(grad, scaled) for grad in grads]
