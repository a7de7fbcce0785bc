"""A decoder-only Transformer like GPT-2 (Radford et al. 2019), pre-norm and causal.

Legend: B rows, T tokens, N new ones, D width, H heads, K = D / H width of a head, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import layers

from tf_dist.models import attention, fast_lstm, kv_cache
from tf_dist.models.cross_attention import CrossAttention
from tf_dist.models.fast_layers import LayerNormalization, gelu
from tf_dist.models.incremental import Span
from tf_dist.models.lm_head import with_head
from tf_dist.models.row_layers import DocumentBias, DocumentPlaces


@keras.saving.register_keras_serializable("tf_dist")
class CausalSelfAttention(layers.Layer):
    """Causal self-attention: a token attends to itself and to those before it (Vaswani et al. 2017).

    Args:
        heads: H; must divide the width of the input.
        dropout: fraction of attention weights dropped in training.
        output_stddev: standard deviation of the output projection's initial weights.
        attend: queries, keys and values, (B, H, T, K) each, -> attention output; without dropout.
    """

    def __init__(
        self,
        heads: int,
        dropout: float,
        output_stddev: float,
        attend: Callable[..., Any] = attention.attention,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.heads, self.dropout, self.output_stddev = heads, dropout, output_stddev
        self.attend = attend
        self.own_heads = heads
        self.biased = False

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the two projections: one for queries, keys and values together, one for the output."""
        width = input_shape[-1]
        assert width is not None
        self.query_key_value = self._expanding(
            3 * width, 3, kernel_initializer=normal(0.02), name="query_key_value"
        )
        self.output_projection = self._contracting(
            width, kernel_initializer=normal(self.output_stddev), name="output_projection"
        )
        self.attention_dropout = layers.Dropout(self.dropout)
        self.query_key_value.build(input_shape)
        self.output_projection.build((*input_shape[:-1], width // self.heads * self.own_heads))

    # Overridden with tensor parallelism (`tf_dist.layers.attention`): a rank has own_heads of the heads,
    # projections to and from these, and their part of the dropout mask of all.
    def _expanding(self, units: int, groups: int = 1, **options: Any) -> layers.Layer:
        return layers.Dense(units, **options)

    def _contracting(self, units: int, **options: Any) -> layers.Layer:
        return layers.Dense(units, **options)

    def _drop(self, weights_BxHxTxT: Any) -> Any:
        return self.attention_dropout(weights_BxHxTxT, training=True)

    def call(self, x_BxTxD: Any, bias: Any = None, training: bool = False) -> Any:
        """Return the attention output, (B, T, D).

        Args:
            x_BxTxD: the input.
            bias: of the scores, see `tf_dist.models.attention.biased_attention`: it says which tokens see
                which. None: causal.
            training: whether dropout is active.
        """
        self.biased = bias is not None
        qkv_BxTx3D = self.query_key_value(x_BxTxD)
        q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = attention.split_heads(qkv_BxTx3D, self.own_heads)
        if training and self.dropout:
            attended_BxHxTxK = attention.attention_with_dropout(
                q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, self._drop, bias
            )
        elif bias is not None:
            attended_BxHxTxK = attention.biased_attention(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, bias)
        else:
            attended_BxHxTxK = self.attend(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK)
        return self.output_projection(attention.join_heads(attended_BxHxTxK))

    # Incremental (`tf_dist.models.incremental`): keys and values are kept.
    bounded = True

    def begin(self, batch: int, length: int) -> kv_cache.KeyValueCache | tuple[kv_cache.KeyValueCache, Any]:
        """Return the cache of ``batch`` rows, for up to ``length`` positions; with a bias, that of each."""
        width = self.query_key_value.kernel.shape[0] // self.heads
        cache = kv_cache.empty(batch, self.own_heads, length, width, self.compute_dtype)
        return (cache, kv_cache.no_bias(batch, length)) if self.biased else cache

    def step(self, x_BxNxD: Any, bias: Any = None, *, cache: Any, span: Span) -> tuple[Any, Any]:
        """Return the attention output of new positions, (B, N, D), and the cache with them."""
        if self.biased:
            return self._biased_step(x_BxNxD, bias, cache, span)
        qkv_BxNx3D = self.query_key_value(x_BxNxD)
        q_BxHxNxK, k_BxHxNxK, v_BxHxNxK = attention.split_heads(qkv_BxNx3D, self.own_heads)
        cache = cache.written(k_BxHxNxK, v_BxHxNxK, span)
        new, length = x_BxNxD.shape[1], cache.k_BxHxLxK.shape[2]
        if bias is None:
            bias = kv_cache.causal_bias(span, new, length, q_BxHxNxK.dtype)
        bias_Bx1xNxL = keras.ops.cast(bias, q_BxHxNxK.dtype)
        attended_BxHxNxK = kv_cache.cached_attention(q_BxHxNxK, cache, bias_Bx1xNxL)
        return self.output_projection(attention.join_heads(attended_BxHxNxK)), cache

    def _biased_step(
        self, x_BxNxD: Any, bias: Any, given: tuple[kv_cache.KeyValueCache, Any], span: Span
    ) -> tuple[Any, Any]:
        """A step where a bias says who sees whom: of new positions, or at first of all that will come."""
        cache, keys_Bx1x1xL = given
        q_BxHxNxK, k_BxHxNxK, v_BxHxNxK = attention.split_heads(self.query_key_value(x_BxNxD), self.own_heads)
        cache = cache.written(k_BxHxNxK, v_BxHxNxK, span)
        new, length = x_BxNxD.shape[1], cache.k_BxHxLxK.shape[2]
        if bias is None:
            bias_Bx1xNxL = keys_Bx1x1xL + kv_cache.causal_bias(span, new, length, tf.float32)
        elif isinstance(bias, kv_cache.BiasOfAll):
            bias_Bx1xNxL = kv_cache.padded_bias(bias.bias[:, :, :new, :new], length, attention.MASKED)
            keys_Bx1x1xL = kv_cache.padded_bias(bias.bias[:, :, -1:, :new], length, 0.0)
        else:
            bias_Bx1xNxL = kv_cache.padded_bias(bias, length, attention.MASKED)
        bias_Bx1xNxL = tf.cast(bias_Bx1xNxL, q_BxHxNxK.dtype)
        attended_BxHxNxK = kv_cache.cached_attention(q_BxHxNxK, cache, bias_Bx1xNxL)
        out_BxNxD = self.output_projection(attention.join_heads(attended_BxHxNxK))
        return out_BxNxD, (cache, keys_Bx1x1xL)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "heads": self.heads,
            "dropout": self.dropout,
            "output_stddev": self.output_stddev,
        }


@keras.saving.register_keras_serializable("tf_dist")
class LearnedPositions(layers.Layer):
    """Adds a trained vector for each position: (B, T, D) -> (B, T, D)."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the table of positions, (T, D)."""
        self.table_TxD = self.add_weight(
            shape=tuple(input_shape[1:]), initializer=normal(0.02), name="positions"
        )

    def call(self, x_BxTxD: Any, places_BxT: Any = None) -> Any:
        """Add positions to the input.

        Args:
            x_BxTxD: the input.
            places_BxT: position of each token, int32, as in packed documents; None: its place in the row.
        """
        if places_BxT is None:
            return x_BxTxD + self.table_TxD
        return x_BxTxD + keras.ops.take(self.table_TxD, places_BxT, axis=0)

    # Incremental (`tf_dist.models.incremental`): nothing is kept, but a position must be known.
    bounded = True

    def begin(self, batch: int, length: int) -> tuple[()]:
        """Return the cache: none."""
        return ()

    def step(
        self, x_BxNxD: Any, places_BxN: Any = None, *, cache: tuple[()], span: Span
    ) -> tuple[Any, tuple[()]]:
        """Add positions to new ones, (B, N, D)."""
        table_TxD = keras.ops.convert_to_tensor(self.table_TxD)
        places_BxN = span.positions(x_BxNxD.shape[1]) if places_BxN is None else places_BxN
        # Padding may lie behind the last position.
        places_BxN = keras.ops.minimum(places_BxN, table_TxD.shape[0] - 1)
        return x_BxNxD + keras.ops.take(table_TxD, places_BxN, axis=0), cache


def normal(stddev: float) -> keras.initializers.Initializer:
    """GPT-2's initial weights: normal, not truncated."""
    return keras.initializers.RandomNormal(stddev=stddev)


class Layers(NamedTuple):
    """Layer types of a model, which ranks may replace by partitioned ones (`tf_dist.layers`).

    attend: queries, keys and values -> attention output, like `tf_dist.models.attention.attention`.
    attention: (heads, dropout, output_stddev, attend, name=) -> a layer like `CausalSelfAttention`.
    positions: (name=) -> a layer like `LearnedPositions`.
    sequence: s, how many ranks partition the tokens of a row: the model takes T / s of them.
    embedding: like `keras.layers.ReversibleEmbedding`.
    column_dense, row_dense: like `keras.layers.Dense`; the output of one feeds only the other.
    lstm: like `keras.layers.LSTM`.
    cross_attention: (heads, dropout, output_stddev, name=) -> a layer like `CrossAttention`.
    """

    attend: Callable[..., Any] = attention.attention
    attention: Callable[..., Any] = CausalSelfAttention
    positions: Callable[..., Any] = LearnedPositions
    sequence: int = 1
    embedding: Callable[..., Any] = layers.ReversibleEmbedding
    column_dense: Callable[..., Any] = layers.Dense
    row_dense: Callable[..., Any] = layers.Dense
    lstm: Callable[..., Any] = fast_lstm.LSTM
    cross_attention: Callable[..., Any] = CrossAttention


PLAIN = Layers()


def build(
    vocab_size: int,
    seq_len: int,
    layer_count: int,
    width: int,
    heads: int,
    dropout: float = 0.0,
    tie_embeddings: bool = True,
    layers: Layers = PLAIN,
    end_of_text: int | None = None,
) -> keras.Model:
    """A Transformer language model, (B, T) token ids -> (B, T, V) logits.

    Initial weights are GPT-2's: normal with 0.02, and 0.02 / sqrt(2 L) for the two projections that
    add to the residual stream in each layer, so that its variance does not grow with depth. ``layers``
    replaces layers that ranks partition; ``seq_len`` is that of full rows. With ``end_of_text``, the id that
    ends a document, a token attends to its own document only, in which positions are counted from 0: a
    document's logits are those that it has alone.
    """
    residual_stddev = 0.02 / (2 * layer_count) ** 0.5
    tokens_BxT = keras.Input((seq_len // layers.sequence,), dtype="int32", name="tokens")
    embedding = layers.embedding(
        vocab_size, width, tie_weights=tie_embeddings, embeddings_initializer=normal(0.02), name="embedding"
    )
    bias, places = None, ()
    if end_of_text is not None:
        bias, places = documents(tokens_BxT, end_of_text)
    x_BxTxD = layers.positions(name="positions")(embedding(tokens_BxT), *places)
    x_BxTxD = keras.layers.Dropout(dropout, name="embedding_dropout")(x_BxTxD)
    for i in range(layer_count):
        x_BxTxD = block(x_BxTxD, width, heads, dropout, residual_stddev, f"layer_{i}", layers, bias)
    x_BxTxD = LayerNormalization(epsilon=1e-5, name="final_norm")(x_BxTxD)
    return with_head(tokens_BxT, x_BxTxD, embedding, "transformer")


def documents(ids_BxT: Any, end: int) -> tuple[Any, tuple[Any, ...]]:
    """What keeps packed documents apart: the bias of attention, and positions for `LearnedPositions`.

    Args:
        ids_BxT: token ids of the rows.
        end: id of the token that ends a document.
    """
    bias_Bx1xTxT = DocumentBias(end, name="documents")(ids_BxT)
    return bias_Bx1xTxT, (DocumentPlaces(name="document_places")(bias_Bx1xTxT),)


def block(
    x_BxTxD: Any,
    width: int,
    heads: int,
    dropout: float,
    stddev: float,
    name: str,
    layers: Layers = PLAIN,
    bias: Any = None,
) -> Any:
    """One layer: attention, then a feed-forward network four times as wide, each on a normalized input.

    Args:
        x_BxTxD: the input.
        width: D.
        heads: H.
        dropout: rate.
        stddev: of the initial weights of projections to the residual stream.
        name: that its layers' names begin with.
        layers: layer types.
        bias: as in `CausalSelfAttention.call`; None: causal.
    """
    Dropout = keras.layers.Dropout
    h = LayerNormalization(epsilon=1e-5, name=f"{name}_attention_norm")(x_BxTxD)
    attention = layers.attention(heads, dropout, stddev, attend=layers.attend, name=f"{name}_attention")
    h = attention(h) if bias is None else attention(h, bias)
    x_BxTxD = x_BxTxD + Dropout(dropout, name=f"{name}_attention_dropout")(h)
    return feed_forward(x_BxTxD, width, dropout, stddev, name, layers)


def feed_forward(
    x_BxTxD: Any, width: int, dropout: float, stddev: float, name: str, layers: Layers = PLAIN
) -> Any:
    """The second half of a `block`, whose arguments these are."""
    Dropout = keras.layers.Dropout
    h = LayerNormalization(epsilon=1e-5, name=f"{name}_feed_forward_norm")(x_BxTxD)
    h = layers.column_dense(
        4 * width, activation=gelu, kernel_initializer=normal(0.02), name=f"{name}_feed_forward_in"
    )(h)
    h = layers.row_dense(width, kernel_initializer=normal(stddev), name=f"{name}_feed_forward_out")(h)
    return x_BxTxD + Dropout(dropout, name=f"{name}_feed_forward_dropout")(h)


def parameter_count(
    vocab_size: int, seq_len: int, layer_count: int, width: int, tie_embeddings: bool = True
) -> int:
    """P = V D (twice if untied) + T D + L (12 D^2 + 13 D) + 2 D."""
    embeddings = vocab_size * width * (1 if tie_embeddings else 2)
    return embeddings + seq_len * width + layer_count * (12 * width**2 + 13 * width) + 2 * width
