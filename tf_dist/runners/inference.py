"""What predictions need of a model: its outputs, and decoding with a cache; no gradients.

Legend: B rows, W words of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from tf_dist.decoding.forward import CachedForward
from tf_dist.runners.cached_forward import CachedModel


class Inference(Protocol):
    """The part of a `tf_dist.runners.runner.ModelRunner` that predicts.

    Attributes:
        gathers_weights: whether every forward pass is a collective of all ranks that share weights: then each
            makes as many.
    """

    gathers_weights: bool

    def outputs(self, x_BxT: np.ndarray) -> np.ndarray:
        """What the model makes of rows, float32; a collective of the ranks that share it."""

    def cached_forward(self) -> CachedForward:
        """The model for token-by-token decoding; a collective of the ranks that share it.

        Raises:
            NotIncremental: on every rank: a layer does not say how it is computed for new positions only.
        """


class WholeInference:
    """`Inference` of a rank with all layers.

    Args:
        model: from rows (B, W) int32.
        words: W.
    """

    gathers_weights = False

    def __init__(self, model: keras.Model, words: int) -> None:
        self._model, self._words = model, words
        self._outputs: Callable[..., Any] | None = None

    def outputs(self, x_BxT: np.ndarray) -> np.ndarray:
        """As in `Inference`."""
        if self._outputs is None:
            model = self._model
            self._outputs = tf.function(lambda x: tf.cast(model(x, training=False), tf.float32))
        return np.asarray(self._outputs(tf.convert_to_tensor(x_BxT, tf.int32)))

    def cached_forward(self) -> CachedForward:
        """As in `Inference`."""
        return CachedModel(self._model, self._words)
