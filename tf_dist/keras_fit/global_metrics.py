"""Keras metrics that are updated with per-step scalars: weighted by rows, counted once over all ranks.

Sums over rows need nothing: the states of all ranks are added up
(`tf_dist.keras_callbacks.metric_reduction`). A tracker (`keras.metrics.Mean`) that is given one number for a
step, such as the loss of a ``train_step``, counts it by this rank's part of the rows, so that the states of
all ranks add up to one number for each step; and a number computed of no rows counts nothing. On a rank none
of whose rows counts, no state of a metric changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import keras
import tensorflow as tf

from tf_dist.keras_fit.step_scope import active


def install() -> None:
    """Patch Keras, once; any further call changes nothing."""
    mean = keras.metrics.Mean
    if not hasattr(mean.update_state, "__wrapped__"):
        mean.update_state = _by_rows(mean.update_state)
        keras.Variable._direct_assign = _if_any_rows(keras.Variable._direct_assign)


def _by_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def update_state(self: Any, values: Any, sample_weight: Any = None) -> Any:
        scope = active()
        if scope is None or scope.captured is not None or isinstance(values, list | tuple | dict):
            return original(self, values, sample_weight)
        values = tf.convert_to_tensor(values)
        if len(values.shape):
            return original(self, values, sample_weight)
        if sample_weight is not None:
            return original(self, tf.where(scope.any_rows, values, tf.zeros_like(values)), sample_weight)
        if scope.law.gradients == "sum":
            return original(self, scope.size * values, tf.constant(1 / scope.size, values.dtype))
        share, any_rows = scope.share()
        return original(self, tf.where(any_rows, values, tf.zeros_like(values)), tf.cast(share, tf.float32))

    return update_state


def _if_any_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def direct_assign(self: Any, value: Any) -> Any:
        scope = active()
        if scope is None or scope.rows is None or not _is_of_a_metric(self, scope.model):
            return original(self, value)
        value = tf.cast(value, self.dtype)
        return original(self, tf.where(scope.any_rows, value, tf.convert_to_tensor(self._value)))

    return direct_assign


def _is_of_a_metric(variable: Any, model: Any) -> bool:
    """Whether it is a state of a metric of the model; asked when it is written, for many are made late."""
    metrics = [*model.metrics, *getattr(model, "_metrics", [])]
    return any(variable is one for metric in metrics for one in metric.variables)
