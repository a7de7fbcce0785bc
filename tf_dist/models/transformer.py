"""A decoder-only Transformer in the manner of GPT-2 (Radford et al. 2019), pre-norm and causal.

Legend: B rows, T tokens, D width, H heads, K = D / H width of a head, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from tf_dist.models import attention
from tf_dist.models.fast_layers import LayerNormalization, gelu
from tf_dist.models.head import with_head


@keras.saving.register_keras_serializable("tf_dist")
class CausalSelfAttention(layers.Layer):
    """Every token attends to itself and those before it (Vaswani et al. 2017).

    Args:
        heads: H; must divide the width of the input.
        dropout: share of attention weights dropped in training.
        output_stddev: standard deviation of the output projection's initial weights.
    """

    def __init__(self, heads: int, dropout: float, output_stddev: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads, self.dropout, self.output_stddev = heads, dropout, output_stddev

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the two projections: one for queries, keys and values together, one for the output."""
        width = input_shape[-1]
        assert width is not None
        self.query_key_value = layers.Dense(
            3 * width, kernel_initializer=normal(0.02), name="query_key_value"
        )
        self.output_projection = layers.Dense(
            width, kernel_initializer=normal(self.output_stddev), name="output_projection"
        )
        self.attention_dropout = layers.Dropout(self.dropout)
        self.query_key_value.build(input_shape)
        self.output_projection.build(input_shape)

    def call(self, x_BxTxD: Any, training: bool = False) -> Any:
        """Return the attended values, (B, T, D)."""
        q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = attention.split_heads(self.query_key_value(x_BxTxD), self.heads)
        if training and self.dropout:

            def drop(weights_BxHxTxT: Any) -> Any:
                return self.attention_dropout(weights_BxHxTxT, training=True)

            attended_BxHxTxK = attention.attention_with_dropout(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, drop)
        else:
            attended_BxHxTxK = attention.attention(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK)
        return self.output_projection(attention.join_heads(attended_BxHxTxK))

    def get_config(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        return {
            **super().get_config(),
            "heads": self.heads,
            "dropout": self.dropout,
            "output_stddev": self.output_stddev,
        }


@keras.saving.register_keras_serializable("tf_dist")
class LearnedPositions(layers.Layer):
    """Adds one trained vector for each position: (B, T, D) -> (B, T, D)."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the table of positions, (T, D)."""
        self.table_TxD = self.add_weight(
            shape=tuple(input_shape[1:]), initializer=normal(0.02), name="positions"
        )

    def call(self, x_BxTxD: Any) -> Any:
        """Return the input with its positions."""
        return x_BxTxD + self.table_TxD


def normal(stddev: float) -> keras.initializers.Initializer:
    """GPT-2's initial weights: normal, without truncation."""
    return keras.initializers.RandomNormal(stddev=stddev)


def build(
    vocab_size: int,
    seq_len: int,
    layer_count: int,
    width: int,
    heads: int,
    dropout: float = 0.0,
    tie_embeddings: bool = True,
) -> keras.Model:
    """A Transformer language model, (B, T) token ids -> (B, T, V) logits.

    Initial weights are GPT-2's: normal with 0.02, and 0.02 / sqrt(2 L) for the two projections that
    add to the residual stream in each layer, so that its variance does not grow with depth.
    """
    residual_stddev = 0.02 / (2 * layer_count) ** 0.5
    tokens_BxT = keras.Input((seq_len,), dtype="int32", name="tokens")
    embedding = layers.ReversibleEmbedding(
        vocab_size, width, tie_weights=tie_embeddings, embeddings_initializer=normal(0.02), name="embedding"
    )
    x_BxTxD = LearnedPositions(name="positions")(embedding(tokens_BxT))
    x_BxTxD = layers.Dropout(dropout, name="embedding_dropout")(x_BxTxD)
    for i in range(layer_count):
        x_BxTxD = _block(x_BxTxD, width, heads, dropout, residual_stddev, f"layer_{i}")
    x_BxTxD = LayerNormalization(epsilon=1e-5, name="final_norm")(x_BxTxD)
    return with_head(tokens_BxT, x_BxTxD, embedding, "transformer")


def _block(x_BxTxD: Any, width: int, heads: int, dropout: float, stddev: float, name: str) -> Any:
    """One layer: attention, then a feed-forward network four times as wide, each on a normed input."""
    h = LayerNormalization(epsilon=1e-5, name=f"{name}_attention_norm")(x_BxTxD)
    h = CausalSelfAttention(heads, dropout, stddev, name=f"{name}_attention")(h)
    x_BxTxD = x_BxTxD + layers.Dropout(dropout, name=f"{name}_attention_dropout")(h)
    h = LayerNormalization(epsilon=1e-5, name=f"{name}_feed_forward_norm")(x_BxTxD)
    h = layers.Dense(
        4 * width, activation=gelu, kernel_initializer=normal(0.02), name=f"{name}_feed_forward_in"
    )(h)
    h = layers.Dense(width, kernel_initializer=normal(stddev), name=f"{name}_feed_forward_out")(h)
    return x_BxTxD + layers.Dropout(dropout, name=f"{name}_feed_forward_dropout")(h)


def parameter_count(
    vocab_size: int, seq_len: int, layer_count: int, width: int, tie_embeddings: bool = True
) -> int:
    """P = V D (twice if untied) + T D + L (12 D^2 + 13 D) + 2 D."""
    embeddings = vocab_size * width * (1 if tie_embeddings else 2)
    return embeddings + seq_len * width + layer_count * (12 * width**2 + 13 * width) + 2 * width
