"""Baseline Transformer of Keras's own layers and operations, as a careful user writes it.

The same weights and numbers as `tf_dist.models.transformer`, without what that computes by hand.
Legend: B rows, T tokens, D width, H heads, K = D / H.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tf_dist.models.transformer import LearnedPositions, normal


class Attention(layers.Layer):
    """Causal self-attention, with one projection for queries, keys and values."""

    def __init__(self, heads: int, output_stddev: float) -> None:
        super().__init__()
        self.heads, self.output_stddev = heads, output_stddev

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make both projections, and the mask."""
        T, D = input_shape[1:]
        assert T is not None and D is not None
        self.projection = layers.Dense(3 * D, kernel_initializer=normal(0.02))
        self.output_projection = layers.Dense(D, kernel_initializer=normal(self.output_stddev))
        self.projection.build(input_shape)
        self.output_projection.build(input_shape)
        self.future_TxT = np.triu(np.full((T, T), -1e9, np.float32), k=1)

    def call(self, x_BxTxD: Any) -> Any:
        """Return the attended values, (B, T, D)."""
        T, D = x_BxTxD.shape[1:]
        K = D // self.heads
        qkv = ops.reshape(self.projection(x_BxTxD), (-1, T, 3, self.heads, K))
        q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = (ops.transpose(qkv[:, :, i], (0, 2, 1, 3)) for i in range(3))
        scores_BxHxTxT = ops.matmul(q_BxHxTxK * K**-0.5, ops.transpose(k_BxHxTxK, (0, 1, 3, 2)))
        weights_BxHxTxT = ops.softmax(scores_BxHxTxT + self.future_TxT, axis=-1)
        attended = ops.transpose(ops.matmul(weights_BxHxTxT, v_BxHxTxK), (0, 2, 1, 3))
        return self.output_projection(ops.reshape(attended, (-1, T, D)))


def transformer(vocab_size: int, seq_len: int, layer_count: int, width: int, heads: int) -> keras.Model:
    """Token ids (B, T) -> logits (B, T, V), with tied embeddings."""
    stddev = 0.02 / (2 * layer_count) ** 0.5
    tokens_BxT = keras.Input((seq_len,), dtype="int32")
    embedding = layers.ReversibleEmbedding(
        vocab_size, width, tie_weights=True, embeddings_initializer=normal(0.02)
    )
    x_BxTxD = LearnedPositions()(embedding(tokens_BxT))
    for _ in range(layer_count):
        x_BxTxD = x_BxTxD + Attention(heads, stddev)(layers.LayerNormalization(epsilon=1e-5)(x_BxTxD))
        h = layers.LayerNormalization(epsilon=1e-5)(x_BxTxD)
        h = layers.Dense(4 * width, activation="gelu", kernel_initializer=normal(0.02))(h)
        x_BxTxD = x_BxTxD + layers.Dense(width, kernel_initializer=normal(stddev))(h)
    x_BxTxD = layers.LayerNormalization(epsilon=1e-5)(x_BxTxD)
    return keras.Model(tokens_BxT, embedding(x_BxTxD, reverse=True))
