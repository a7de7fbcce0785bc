"""Whose code computes the objective of a model: Keras's alone, or the user's too."""

from __future__ import annotations

from typing import Any

import keras

from tf_dist.keras_fit.global_losses import is_users, is_users_code


def is_keras_alone(model: Any) -> bool:
    """Whether no code of the user computes the objective: then `Law()` holds by construction."""
    if any(
        module_of(getattr(type(model), name)) != "keras" for name in ("train_step", "compute_loss", "loss")
    ):
        return False
    losses = [] if model._compile_loss is None else keras.tree.flatten(model._compile_loss._user_loss)
    if not all(loss is None or _is_keras_loss(loss) for loss in losses):
        return False
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Lambda) or layer.activity_regularizer is not None:
            return False
        if module_of(type(layer)) != "keras" and not _only_holds(layer):
            return False
    return all(isinstance(one, keras.Layer) for one in getattr(model, "operations", []))


def module_of(thing: Any) -> str:
    """The package in which a class or a function was written."""
    return str(getattr(thing, "__module__", "")).split(".")[0]


def _is_keras_loss(loss: Any) -> bool:
    if isinstance(loss, str | dict):
        try:
            loss = keras.losses.get(loss)
        except ValueError:
            return False
    if isinstance(loss, keras.losses.Loss):
        return not is_users(loss)
    return not is_users_code(loss)


def _only_holds(layer: Any) -> bool:
    """Whether a class of the user is Keras's Functional or Sequential model under another name."""
    return isinstance(layer, keras.Model) and module_of(type(layer).call) == "keras"
