"""Patch Keras at the first `fit` over several ranks, also without an explicit `distribute`.

This file is imported with ``tf_dist``, before Keras is, and so imports neither Keras nor TensorFlow.
"""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from typing import Any

from tf_dist.comm.runtime.communicators import connected


def watch_fit(keras: Any) -> None:
    """Let the first `fit` over ranks install `tf_dist.keras_fit.patches`; called when Keras is imported."""
    trainer = next(kind for kind in keras.Model.__mro__ if "fit" in vars(kind))
    original = trainer.fit

    @wraps(original)
    def fit(self: Any, *arguments: Any, **words: Any) -> Any:
        comm = connected()
        if trainer.fit is not fit or comm is None or comm.size == 1:
            return original(self, *arguments, **words)
        trainer.fit = original
        import_module("tf_dist.keras_fit.patches").install()
        return trainer.fit(self, *arguments, **words)

    trainer.fit = fit
