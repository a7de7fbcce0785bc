"""The forward pass with which text is written: with a cache where the model's layers allow it.

Legend: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.decoding.forward import CachedForward, WindowForward
from tf_dist.models.incremental import NotIncremental
from tf_dist.runners.cached_forward import CachedModel
from tf_dist.runners.runner import ModelRunner

LOG = logging.getLogger(__name__)
WITHOUT_CACHE = "text is written without a cache, each token from its whole window: {}"


def forward_of(runner: ModelRunner, seq_len: int, lockstep: bool) -> CachedForward:
    """The forward pass of a runner's model for decoding: with a cache if its layers have one, else without.

    Args:
        runner: of this rank.
        seq_len: T.
        lockstep: whether data-parallel ranks have to call it together, if it has no cache.
    """
    try:
        return runner.cached_forward()
    except NotIncremental as why:
        LOG.info(WITHOUT_CACHE.format(why))

    def logits_at(x_BxT: np.ndarray, place_B: np.ndarray) -> np.ndarray:
        rows = zip(x_BxT, place_B, strict=True)
        return np.stack([runner.logits(x_T[None])[place] for x_T, place in rows])

    return WindowForward(logits_at, seq_len, lockstep)


def forward_of_model(model: keras.Model, seq_len: int) -> CachedForward:
    """As `forward_of`, of a model without a runner: token ids (B, T) int32 -> logits (B, T, V), causal."""
    try:
        return CachedModel(model, seq_len)
    except NotIncremental as why:
        LOG.info(WITHOUT_CACHE.format(why))
        return window_forward_of_model(model, seq_len)


def window_forward_of_model(model: keras.Model, seq_len: int) -> WindowForward:
    """The forward pass without a cache, of all T tokens for each new one."""

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def logits_at(x_BxT: tf.Tensor, place_B: tf.Tensor) -> Any:
        logits_BxTxV = model(x_BxT, training=False)
        return tf.cast(tf.gather(logits_BxTxV, place_B, axis=1, batch_dims=1), tf.float32)

    def of_arrays(x_BxT: np.ndarray, place_B: np.ndarray) -> np.ndarray:
        return np.asarray(logits_at(tf.convert_to_tensor(x_BxT), tf.convert_to_tensor(place_B)))

    return WindowForward(of_arrays, seq_len)
