"""Frozen weights: no gradient, no optimizer state; the same on all ranks, and saved like the others."""

from __future__ import annotations

from typing import Any

import keras

from tf_dist.models.patterns import chosen


def freeze(model: keras.Model, patterns: str) -> int:
    """Freeze the weights that some patterns choose; returns how many were trainable before.

    A layer with statistics of its own (BatchNormalization) of which all weights are chosen keeps these as
    well: it computes as in evaluation.

    Args:
        model: built; its weights may be deferred (`tf_dist.models.meta_init`).
        patterns: see `tf_dist.models.patterns`.

    Raises:
        UsageError: a pattern matches no weight.
    """
    weights = model.weights
    frozen = [weights[i] for i in chosen([weight.path for weight in weights], patterns, "--freeze")]
    count = sum(bool(weight.trainable) for weight in frozen)
    for weight in frozen:
        weight.trainable = False
    numbers = {id(weight) for weight in frozen}
    for layer in model._flatten_layers():
        if _keeps_statistics(layer) and all(id(weight) in numbers for weight in layer.weights):
            layer.trainable = False
    return count


def _keeps_statistics(layer: Any) -> bool:
    if any(True for _ in layer._flatten_layers(include_self=False)):
        return False
    trained = {id(weight) for weight in layer._trainable_variables}
    return any(id(weight) not in trained for weight in layer.weights)
