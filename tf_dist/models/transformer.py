"""A decoder-only, causal Transformer: GPT-2 (Radford et al. 2019), or what its options make of it.

Legend: B rows, T tokens, N new ones, D width, F width of the feed-forward network, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from tf_dist.config.transformer import LEARNED, NO_BIASES, POST, PRE, RMSNORM, TransformerOptions
from tf_dist.models import attention, fast_lstm
from tf_dist.models.body_sizes import GPT2, BodySizes
from tf_dist.models.cross_attention import CrossAttention
from tf_dist.models.fast_layers import Gated, LayerNormalization, RMSNormalization, gelu, gelu_tanh
from tf_dist.models.incremental import Span
from tf_dist.models.lm_head import with_head
from tf_dist.models.row_layers import DocumentBias, DocumentPlaces
from tf_dist.models.self_attention import CausalSelfAttention


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
    attention: (heads, dropout, output_stddev, attend, kind, places, name=) -> a layer like
        `CausalSelfAttention`.
    positions: (name=) -> a layer like `LearnedPositions`.
    places: positions in a row of the tokens that the model takes; None: all of them.
    sequence: s, how many ranks partition the tokens of a row: the model takes T / s of them.
    embedding: like `keras.layers.ReversibleEmbedding`.
    column_dense, row_dense: like `keras.layers.Dense`; the output of one feeds only the other.
    lstm: like `keras.layers.LSTM`.
    cross_attention: (heads, dropout, output_stddev, kind, name=) -> a layer like `CrossAttention`.
    """

    attend: Callable[..., Any] = attention.attention
    attention: Callable[..., Any] = CausalSelfAttention
    positions: Callable[..., Any] = LearnedPositions
    places: np.ndarray | None = None
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
    kind: TransformerOptions = GPT2,
) -> keras.Model:
    """A Transformer language model, (B, T) token ids -> (B, T, V) logits.

    Initial weights are GPT-2's: normal with 0.02, and 0.02 / sqrt(2 L) for the two projections that
    add to the residual stream in each layer, so that its variance does not grow with depth. ``layers``
    replaces layers that ranks partition; ``seq_len`` is that of full rows. With ``end_of_text``, the id that
    ends a document, a token attends to its own document only, in which learned positions are counted from 0:
    a document's logits are those that it has alone. ``kind`` says what its layers are made of.
    """
    sizes = BodySizes(layer_count, width, heads, dropout, tie_embeddings, kind)
    tokens_BxT = keras.Input((seq_len // layers.sequence,), dtype="int32", name="tokens")
    embedding = layers.embedding(
        vocab_size, width, tie_weights=tie_embeddings, embeddings_initializer=normal(0.02), name="embedding"
    )
    bias, places = None, ()
    if end_of_text is not None:
        bias, places = documents(tokens_BxT, end_of_text)
    x_BxTxD = at_positions(embedding(tokens_BxT), sizes, layers, places)
    for i in range(layer_count):
        x_BxTxD = block(x_BxTxD, sizes, f"layer_{i}", layers, bias)
    return with_head(tokens_BxT, final_norm(x_BxTxD, kind), embedding, "transformer")


def documents(ids_BxT: Any, end: int) -> tuple[Any, tuple[Any, ...]]:
    """What keeps packed documents apart: the bias of attention, and positions for `LearnedPositions`.

    Args:
        ids_BxT: token ids of the rows.
        end: id of the token that ends a document.
    """
    bias_Bx1xTxT = DocumentBias(end, name="documents")(ids_BxT)
    return bias_Bx1xTxT, (DocumentPlaces(name="document_places")(bias_Bx1xTxT),)


def at_positions(x_BxTxD: Any, sizes: BodySizes, layers: Layers = PLAIN, places: tuple[Any, ...] = ()) -> Any:
    """Embeddings, (B, T, D), at learned positions where there are such; a post-norm model normalizes them.

    ``places``: position of each token, as in `LearnedPositions.call`.
    """
    if sizes.kind.position_embedding == LEARNED:
        x_BxTxD = layers.positions(name="positions")(x_BxTxD, *places)
    if sizes.kind.norm_order == POST:
        x_BxTxD = norm(sizes.kind, "embedding_norm")(x_BxTxD)
    return keras.layers.Dropout(sizes.dropout, name="embedding_dropout")(x_BxTxD)


def block(x_BxTxD: Any, sizes: BodySizes, name: str, layers: Layers = PLAIN, bias: Any = None) -> Any:
    """One layer: attention, then a feed-forward network, each on a normalized input.

    Args:
        x_BxTxD: the input.
        sizes: of the model.
        name: that its layers' names begin with.
        layers: layer types.
        bias: as in `CausalSelfAttention.call`; None: causal.
    """
    attention = self_attention(sizes, f"{name}_attention", layers)
    h = before(x_BxTxD, sizes.kind, f"{name}_attention_norm")
    h = attention(h) if bias is None else attention(h, bias)
    x_BxTxD = added(x_BxTxD, h, sizes, f"{name}_attention")
    return feed_forward(x_BxTxD, sizes, name, layers)


def self_attention(sizes: BodySizes, name: str, layers: Layers = PLAIN) -> Any:
    """A layer like `CausalSelfAttention`, not called yet."""
    return layers.attention(
        sizes.heads, sizes.dropout, sizes.residual_stddev, attend=layers.attend, kind=sizes.kind,
        places=layers.places, name=name,
    )  # fmt: skip


def feed_forward(x_BxTxD: Any, sizes: BodySizes, name: str, layers: Layers = PLAIN) -> Any:
    """The second half of a `block`, whose arguments these are."""
    kind, name = sizes.kind, f"{name}_feed_forward"
    width = kind.width_of_ffn(sizes.width)
    h = before(x_BxTxD, kind, f"{name}_norm")

    def widened(which: str, activation: Any = None) -> Any:
        return layers.column_dense(
            width, activation=activation, use_bias=kind.has_bias(), kernel_initializer=normal(0.02),
            name=f"{name}_{which}",
        )(h)  # fmt: skip

    if kind.gated:
        h = Gated(kind.activation, name=f"{name}_gated")(widened("gate"), widened("in"))
    else:
        h = widened("in", ACTIVATIONS[kind.activation])
    h = layers.row_dense(
        sizes.width, use_bias=kind.has_bias(), kernel_initializer=normal(sizes.residual_stddev),
        name=f"{name}_out",
    )(h)  # fmt: skip
    return added(x_BxTxD, h, sizes, name)


ACTIVATIONS = {"gelu": gelu, "gelu-tanh": gelu_tanh, "relu": "relu"}


def before(x_BxTxD: Any, kind: TransformerOptions, name: str) -> Any:
    """The input of a sublayer: normalized, but in a post-norm model."""
    return norm(kind, name)(x_BxTxD) if kind.norm_order == PRE else x_BxTxD


def added(x_BxTxD: Any, h_BxTxD: Any, sizes: BodySizes, name: str) -> Any:
    """The residual stream with the output of a sublayer, (B, T, D); normalized by a post-norm model."""
    x_BxTxD = x_BxTxD + keras.layers.Dropout(sizes.dropout, name=f"{name}_dropout")(h_BxTxD)
    return norm(sizes.kind, f"{name}_norm")(x_BxTxD) if sizes.kind.norm_order == POST else x_BxTxD


def final_norm(x_BxTxD: Any, kind: TransformerOptions) -> Any:
    """The states that a head takes; a post-norm model has normalized them."""
    return before(x_BxTxD, kind, "final_norm")


def norm(kind: TransformerOptions, name: str) -> keras.layers.Layer:
    """A norm of the last axis."""
    if kind.normalization == RMSNORM:
        return RMSNormalization(epsilon=kind.norm_epsilon, name=name)
    return LayerNormalization(epsilon=kind.norm_epsilon, center=kind.bias != NO_BIASES, name=name)


def parameter_count(
    vocab_size: int, seq_len: int, layer_count: int, width: int, tie_embeddings: bool = True
) -> int:
    """P = V D (twice if untied) + T D + L (12 D^2 + 13 D) + 2 D, of GPT-2's layers."""
    embeddings = vocab_size * width * (1 if tie_embeddings else 2)
    return embeddings + seq_len * width + layer_count * (12 * width**2 + 13 * width) + 2 * width
