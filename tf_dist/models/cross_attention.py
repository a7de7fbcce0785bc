"""Attention of a decoder to the output of an encoder (Vaswani et al. 2017).

Legend: B rows, T target tokens, S source slots, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers

from tf_dist.config.transformer import TransformerOptions
from tf_dist.models import attention
from tf_dist.models.body_sizes import GPT2, described
from tf_dist.models.incremental import Span


@keras.saving.register_keras_serializable("tf_dist")
class CrossAttention(layers.Layer):
    """Each target token attends to all source slots that are not padding.

    Args:
        heads: H; must divide the width of the input.
        dropout: fraction of attention weights dropped in training.
        output_stddev: standard deviation of the output projection's initial weights.
        kind: width of a head, heads of keys and values, and biases; there are no positions to rotate by.
    """

    def __init__(
        self,
        heads: int,
        dropout: float,
        output_stddev: float,
        kind: TransformerOptions | dict[str, Any] = GPT2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.heads, self.dropout, self.output_stddev = heads, dropout, output_stddev
        self.kind = TransformerOptions(**kind) if isinstance(kind, dict) else kind
        self.kv_heads = self.kind.kv_heads or heads
        self.own_heads, self.own_kv_heads = heads, self.kv_heads

    def build(self, x_shape: Any, memory_shape: Any, bias_shape: Any) -> None:
        """Create the projections: of queries, of keys and values together, of the output."""
        width = x_shape[-1]
        self._sources = memory_shape[1]
        self.head_width = self.kind.width_of_head(width, self.heads)
        # An initializer for each: one alone would draw the same numbers twice.
        self.query = self._to_heads(self.heads, 1, "query")
        self.key_value = self._to_heads(2 * self.kv_heads, 2, "key_value")
        self.output_projection = self._contracting(
            width,
            use_bias=self.kind.has_bias(),
            kernel_initializer=keras.initializers.RandomNormal(stddev=self.output_stddev),
            name="output_projection",
        )
        self.attention_dropout = layers.Dropout(self.dropout)
        self.query.build(x_shape)
        self.key_value.build(memory_shape)
        self.output_projection.build((*x_shape[:-1], self.head_width * self.own_heads))

    def _to_heads(self, heads: int, groups: int, name: str) -> layers.Layer:
        return self._expanding(
            heads * self.head_width, groups, use_bias=self.kind.has_bias(of_queries=True),
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.02), name=name,
        )  # fmt: skip

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
        (q_BxHxTxK,) = attention.split_heads(self.query(x), self.own_heads, 1)
        k_BxHxSxK, v_BxHxSxK = self._keys_and_values(memory)
        if training and self.dropout:
            attended_BxHxTxK = attention.attention_with_dropout(
                q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, self._drop, bias
            )
        else:
            attended_BxHxTxK = attention.biased_attention(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, bias)
        return self.output_projection(attention.join_heads(attended_BxHxTxK))

    def _keys_and_values(self, memory: Any) -> list[Any]:
        """Of the source, (B, H, S, K) each, for all of this rank's queries."""
        parts = attention.split_heads(self.key_value(memory), self.own_kv_heads, 2)
        return [attention.repeat_heads(one, self.own_heads) for one in parts]

    bounded = True

    def begin(self, batch: int, length: int) -> Any:
        """Return the cache: keys, values and the bias of the source's slots."""
        zeros = tf.zeros((batch, self.own_heads, self._sources, self.head_width), self.compute_dtype)
        return zeros, zeros, tf.zeros((batch, 1, 1, self._sources))

    def step(self, x: Any, memory: Any, bias: Any, *, cache: Any, span: Span) -> tuple[Any, Any]:
        """Return the output of new target tokens, (B, N, D), and the cache, with the source once given."""
        if memory is not None:
            cache = (*self._keys_and_values(memory), bias)
        k_BxHxSxK, v_BxHxSxK, bias = cache
        (q_BxHxNxK,) = attention.split_heads(self.query(x), self.own_heads, 1)
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
            **described(self.kind),
        }
