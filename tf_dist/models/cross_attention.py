"""Attention of a decoder to the output of an encoder (Vaswani et al. 2017).

Legend: B rows, T target tokens, S source slots, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers

from tf_dist.models import attention
from tf_dist.models.incremental import Span


@keras.saving.register_keras_serializable("tf_dist")
class CrossAttention(layers.Layer):
    """Each target token attends to all source slots that are not padding.

    Args:
        heads: H; must divide the width of the input.
        dropout: fraction of attention weights dropped in training.
        output_stddev: standard deviation of the output projection's initial weights.
    """

    def __init__(self, heads: int, dropout: float, output_stddev: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads, self.dropout, self.output_stddev = heads, dropout, output_stddev
        self.own_heads = heads

    def build(self, x_shape: Any, memory_shape: Any, bias_shape: Any) -> None:
        """Create the projections: of queries, of keys and values together, of the output."""
        width = x_shape[-1]
        self._sources = memory_shape[1]
        begin = keras.initializers.RandomNormal(stddev=0.02)
        self.query = self._expanding(width, kernel_initializer=begin, name="query")
        # An initializer of its own: Keras's draw the same numbers each time.
        begin = keras.initializers.RandomNormal(stddev=0.02)
        self.key_value = self._expanding(2 * width, 2, kernel_initializer=begin, name="key_value")
        self.output_projection = self._contracting(
            width,
            kernel_initializer=keras.initializers.RandomNormal(stddev=self.output_stddev),
            name="output_projection",
        )
        self.attention_dropout = layers.Dropout(self.dropout)
        self.query.build(x_shape)
        self.key_value.build(memory_shape)
        self.output_projection.build((*x_shape[:-1], width // self.heads * self.own_heads))

    # Overridden with tensor parallelism (`tf_dist.layers.attention`).
    def _expanding(self, units: int, groups: int = 1, **options: Any) -> layers.Layer:
        return layers.Dense(units, **options)

    def _contracting(self, units: int, **options: Any) -> layers.Layer:
        return layers.Dense(units, **options)

    def _drop(self, weights_BxHxTxS: Any) -> Any:
        return self.attention_dropout(weights_BxHxTxS, training=True)

    def call(self, x: Any, memory: Any, bias: Any, training: bool = False) -> Any:
        """Return the attention output, (B, T, D).

        Args:
            x: of the decoder, (B, T, D).
            memory: output of the encoder, (B, S, D).
            bias: of the scores: 0 or `MASKED`, (B, 1, 1, S).
            training: whether dropout is active.
        """
        (q_BxHxTxK,) = _heads(self.query(x), self.own_heads, 1)
        k_BxHxSxK, v_BxHxSxK = _heads(self.key_value(memory), self.own_heads, 2)
        if training and self.dropout:
            attended_BxHxTxK = attention.attention_with_dropout(
                q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, self._drop, bias
            )
        else:
            attended_BxHxTxK = attention.biased_attention(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, bias)
        return self.output_projection(attention.join_heads(attended_BxHxTxK))

    bounded = True

    def begin(self, batch: int, length: int) -> Any:
        """Return the cache: keys, values and the bias of the source's slots."""
        K, S = self.query.kernel.shape[0] // self.heads, self._sources
        zeros = tf.zeros((batch, self.own_heads, S, K), self.compute_dtype)
        return zeros, zeros, tf.zeros((batch, 1, 1, S))

    def step(self, x: Any, memory: Any, bias: Any, *, cache: Any, span: Span) -> tuple[Any, Any]:
        """Return the output of new target tokens, (B, N, D), and the cache, with the source once given."""
        if memory is not None:
            cache = (*_heads(self.key_value(memory), self.own_heads, 2), bias)
        k_BxHxSxK, v_BxHxSxK, bias = cache
        (q_BxHxNxK,) = _heads(self.query(x), self.own_heads, 1)
        attended_BxHxNxK = attention.biased_attention(q_BxHxNxK, k_BxHxSxK, v_BxHxSxK, bias)
        return self.output_projection(attention.join_heads(attended_BxHxNxK)), cache

    def compute_output_shape(self, x_shape: Any, memory_shape: Any, bias_shape: Any) -> Any:
        """Return (B, T, D)."""
        return x_shape

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "heads": self.heads,
            "dropout": self.dropout,
            "output_stddev": self.output_stddev,
        }


def _heads(x_BxNxC: tf.Tensor, heads: int, parts: int) -> list[Any]:
    """Split one projection into ``parts`` arrays, (B, H, N, K) each."""
    N, K = x_BxNxC.shape[1], x_BxNxC.shape[2] // (parts * heads)
    split_BxNxPxHxK = tf.reshape(x_BxNxC, (-1, N, parts, heads, K))
    return list(tf.unstack(tf.transpose(split_BxNxPxHxK, (2, 0, 3, 1, 4)), parts))
