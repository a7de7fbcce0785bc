"""Keras losses normalized by global counts, so that the objective of N ranks is that of one process.

Inside of a `step_scope`, the value of a loss is that of the global batch, on every rank, and its gradient
is R times the part that this rank's rows have in it; the mean over ranks, which follows, is their sum.

* A loss of values per row (or token) is a sum and a count: both are summed over the ranks, then divided.
  Masks weigh by the masked counts of all ranks. ``reduction="sum"`` is the sum alone.
* ``reduction=None``: the values of all rows are gathered, so whatever sums or averages them is right.
* A loss function of the user that gives one number may divide by anything: it is given the predictions and
  targets of all ranks. So are those of Keras that do (Dice, Tversky) or compare rows (circle).
* Values of `Layer.add_loss` are means over rows, or sums over them, as the `Law` says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses import loss as keras_loss

from tf_dist.keras_fit.step_scope import StepScope, active, entered

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


def install() -> None:
    """Patch Keras, once; any further call changes nothing."""
    if hasattr(keras_loss.reduce_values, "__wrapped__"):
        return
    keras_loss.reduce_values = _reduce_values(keras_loss.reduce_values)
    keras_loss.apply_mask = _apply_mask(keras_loss.apply_mask)
    keras.losses.Loss.__call__ = _loss_call(keras.losses.Loss.__call__)
    keras.Layer._get_own_losses = _own_losses(keras.Layer._get_own_losses)


def is_across_rows(function: Any) -> bool:
    """Whether a function of Keras compares rows, or divides by what it sums over all of them."""
    return function in (keras.losses.dice, keras.losses.tversky, keras.losses.circle)


def is_users_code(function: Any) -> bool:
    """Whether a function, a method or an object of a class is not Keras's."""
    return not str(getattr(function, "__module__", "")).startswith("keras.src.")


def is_users(loss: Any) -> bool:
    """Whether a loss computes by code that is not Keras's."""
    function = getattr(loss, "fn", None)
    return is_users_code(type(loss).call if function is None else function)


def _global(here: Any, everyone: Any, factor: Any) -> Any:
    """The value ``everyone``, with ``factor`` times the gradient of ``here``, which may be no number."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def replaced(_: Any) -> Any:
        return tf.identity(everyone), lambda upstream: upstream * tf.cast(factor, upstream.dtype)

    return replaced(here)


def _acts() -> StepScope | None:
    scope = active()
    return scope if scope is not None and scope.law.global_losses else None


def _reduce_values(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def reduce_values(values: Any, sample_weight: Any = None, reduction: str | None = MEANS[0]) -> Any:
        scope = _acts()
        if scope is None or len(values.shape) == 0:
            return original(values, sample_weight, reduction)
        values = scope.unscaled(values)
        if reduction in (None, "none"):
            return scope.reduction.gather_rows(scope.that_count(values), "the losses of rows")
        total = scope.if_any(tf.reduce_sum(values))
        if reduction == "sum":
            (everyone,) = scope.reduction.sums([total], "a sum of losses")
            return _global(total, everyone, scope.size)
        if reduction == "mean_with_sample_weight" and sample_weight is not None:
            count = tf.cast(tf.reduce_sum(sample_weight), total.dtype)
        else:
            count = tf.cast(tf.size(values), total.dtype)
        count = scope.if_any(count)
        sums = scope.reduction.sums([total, count], "a mean of losses")
        factor = tf.math.divide_no_nan(tf.cast(scope.size, total.dtype), sums[1])
        return _global(total, tf.math.divide_no_nan(sums[0], sums[1]), factor)

    return reduce_values


def _apply_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def apply_mask(sample_weight: Any, mask: Any, dtype: Any, reduction: str | None) -> Any:
        scope = _acts()
        if scope is None or mask is None or reduction not in ("mean", "sum_over_batch_size"):
            return original(sample_weight, mask, dtype, reduction)
        # Keras: weight total / valid for each valid entry, so that the mean is that of the valid ones.
        weights = original(sample_weight, mask, dtype, "sum")
        total, valid = tf.cast(tf.size(mask), dtype), tf.reduce_sum(tf.cast(mask, dtype))
        total, valid = scope.if_any(total), scope.if_any(valid)
        total, valid = scope.reduction.sums([total, valid], "the count of a mask")
        return weights * tf.cast(tf.math.divide_no_nan(total, valid), weights.dtype)

    return apply_mask


def _loss_call(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def call(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        scope = _acts()
        if scope is None or isinstance(self, _containers()):
            return original(self, y_true, y_pred, sample_weight)
        if is_across_rows(getattr(self, "fn", None)):
            return _of_all_rows(original, self, scope, y_true, y_pred, sample_weight)
        if not is_users(self):
            return original(self, y_true, y_pred, sample_weight)
        if scope.law.gather_user_losses or _one_number(self, y_true, y_pred):
            return _of_all_rows(original, self, scope, y_true, y_pred, sample_weight)
        return original(self, y_true, y_pred, sample_weight)

    return call


def _containers() -> tuple[type, ...]:
    from keras.src.trainers.compile_utils import CompileLoss

    return (CompileLoss,)  # it calls the losses that it holds


def _one_number(loss: Any, y_true: Any, y_pred: Any) -> bool:
    """Whether a loss is computed from all rows at once, as far as shapes tell."""
    with entered(None):
        spec = keras.tree.map_structure(_spec, (y_true, y_pred))
        try:
            shape = tf.function(loss.call).get_concrete_function(*spec).structured_outputs.shape
        except Exception:  # it does not say before it runs: what it means is found by trying (`objective`)
            return False
    return bool(shape.rank == 0)


def _spec(tensor: Any) -> Any:
    tensor = tf.convert_to_tensor(tensor)
    dtype = tensor.dtype if tensor.dtype.is_floating else keras.config.floatx()
    return tf.TensorSpec(tensor.shape, dtype)


def _of_all_rows(
    original: Callable[..., Any], loss: Any, scope: StepScope, y_true: Any, y_pred: Any, weight: Any
) -> Any:
    def everyones(what: str, nest: Any) -> Any:
        return keras.tree.map_structure(lambda one: scope.gathered(one, what), nest)

    y_pred = keras.tree.map_structure(scope.unscaled, y_pred)
    y_true, y_pred = everyones("the targets of a loss", y_true), everyones("the outputs of a model", y_pred)
    weight = None if weight is None else everyones("sample weights", weight)
    with entered(None):
        return original(loss, y_true, y_pred, weight)


def _own_losses(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def own_losses(self: Any) -> list[Any]:
        scope, losses = _acts(), original(self)
        return losses if scope is None else [_added(scope, loss) for loss in losses]

    return own_losses


def _added(scope: StepScope, loss: Any) -> Any:
    loss = tf.reduce_sum(tf.convert_to_tensor(loss))
    loss = scope.unscaled(loss if loss.dtype.is_floating else tf.cast(loss, keras.config.floatx()))
    if scope.law.added == "sum":
        loss = scope.if_any(loss)
        (everyone,) = scope.reduction.sums([loss], "a sum of add_loss")
        return _global(loss, everyone, scope.size)
    share, any_rows = scope.share()
    share = tf.cast(share, loss.dtype)
    # A mean over no row is no number, and counts nothing.
    (everyone,) = scope.reduction.sums([tf.where(any_rows, loss * share, 0)], "a mean of add_loss")
    return _global(loss, everyone, scope.size * share)
