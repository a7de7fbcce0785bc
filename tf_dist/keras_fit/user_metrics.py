"""Metrics of the user's own code are computed of the rows of all ranks.

A metric function may divide by anything, and a `keras.metrics.Metric` may keep anything: what N ranks make of
it cannot be put together from their results. Inside of a `step_scope` such a metric is updated with the
targets, outputs and weights of all ranks, on every rank, and its result is that of one process. It costs the
transfer of these rows in each step; ``sums_over_ranks = True``, on the class or the function, says that the
sum of the ranks' states is the state of one process, as it is for Keras's own metrics, and saves that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import keras
import tensorflow as tf

from tf_dist.comm.runtime.log_handlers import once
from tf_dist.errors import UsageError
from tf_dist.keras_callbacks.metric_reduction import OF_ALL_ROWS
from tf_dist.keras_fit.global_losses import is_across_rows, is_users_code
from tf_dist.keras_fit.step_scope import StepScope, active, entered, rows_of

LOG = logging.getLogger(__name__)


def install() -> None:
    """Patch the `update_state` of all metrics there are; again for those of classes defined since."""
    wrapper = keras.metrics.MeanMetricWrapper
    for kind in (wrapper, *_subclasses(keras.metrics.Metric)):
        original = kind.update_state
        if (kind is wrapper or is_users_code(original)) and not hasattr(original, "_of_all_rows"):
            kind.update_state = _of_all_rows(original)


def _subclasses(kind: Any) -> Iterator[Any]:
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)


def _of_all_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def update_state(self: Any, *arguments: Any, **words: Any) -> Any:
        scope, update = active(), original.__get__(self)
        if scope is None or scope.captured is not None or not _needs_all_rows(self):
            return update(*arguments, **words)
        given = keras.tree.flatten((arguments, words))
        if not any(_has_rows(one, scope) for one in given):
            return update(*arguments, **words)
        if not getattr(self, OF_ALL_ROWS, False):
            object.__setattr__(self, OF_ALL_ROWS, True)  # past Keras, which would track it
            once(LOG, scope.reduction.comm).info(
                f"metric {self.name} is computed of the rows of all ranks, which are transferred in each "
                "step; sums_over_ranks = True on its class or function saves that, if its states are sums"
            )
        arguments, words = keras.tree.map_structure(
            lambda one: _everyones(one, scope, self), (arguments, words)
        )
        with entered(None):
            return update(*arguments, **words)

    update_state._of_all_rows = True  # type: ignore[attr-defined]
    return update_state


def _needs_all_rows(metric: Any) -> bool:
    """Whether code of the user computes it, and does not say that its states are sums."""
    function = getattr(metric, "_fn", None)
    if getattr(metric, "sums_over_ranks", None) or getattr(function, "sums_over_ranks", False):
        return False
    own = type(metric).update_state is not keras.metrics.MeanMetricWrapper.update_state
    return own or is_users_code(function) or is_across_rows(function)


def _has_rows(value: Any, scope: StepScope) -> bool:
    """Whether a value has a row for each of the batch; its static shape says so in a graph."""
    if not tf.is_tensor(value) or value.shape.rank == 0:
        return False
    if value.shape.rank is None or value.shape[0] is None:
        return True
    return bool(tf.executing_eagerly() and value.shape[0] == int(rows_of(scope.data)))


def _everyones(value: Any, scope: StepScope, metric: Any) -> Any:
    if not _has_rows(value, scope):
        return value
    if not isinstance(value, tf.Tensor):
        raise UsageError(
            f"metric {metric.name} is computed of the rows of all ranks, and {type(value).__name__} cannot "
            "be transferred: convert it to a dense tensor, or set sums_over_ranks = True on the metric's "
            "class or function if its states add up over rows"
        )
    key = tf.compat.v1.get_default_graph(), value.ref()  # what a branch has gathered is its own
    if key not in scope.metric_rows:
        scope.metric_rows[key] = scope.gathered(value, f"the rows of metric {metric.name}")
    return scope.metric_rows[key]
