"""LSTMs of rows: an encoder, a prefix decoder, and an encoder-decoder with attention.

Legend: B rows, S source and T target slots, D width.
"""

from __future__ import annotations

from typing import Any

import keras

from tf_dist.models.body_sizes import BodySizes
from tf_dist.models.row_embedding import embedded_row, marked_source
from tf_dist.models.row_heads import with_row_head
from tf_dist.models.row_layers import JoinSlots, Reverse, Slice, SourceAttention
from tf_dist.models.row_layout import SPANS, Head, RowLayout
from tf_dist.models.transformer import PLAIN, Layers


def encoder(layout: RowLayout, sizes: BodySizes, head: Head, layers: Layers = PLAIN) -> keras.Model:
    """Bidirectional layers (Schuster & Paliwal 1997), whose two directions are added."""
    row = embedded_row(layout, sizes, layers, _uniform())
    source = marked_source(row, layout, sizes) if head.kind == SPANS else row.source
    return with_row_head(row, _both_ways(source, sizes, layers), head, "lstm_encoder")


def prefix_decoder(layout: RowLayout, sizes: BodySizes, head: Head, layers: Layers = PLAIN) -> keras.Model:
    """One stack that reads the source, then predicts the target (Sutskever et al. 2014, one network)."""
    row = embedded_row(layout, sizes, layers, _uniform())
    x = JoinSlots(layout.source.count, name="slots")(row.target, row.source)
    x = keras.layers.Dropout(sizes.dropout, name="embedding_dropout")(x)
    for i in range(sizes.layers):
        x = layers.lstm(sizes.width, return_sequences=True, name=f"layer_{i}")(x)
        x = keras.layers.Dropout(sizes.dropout, name=f"layer_{i}_dropout")(x)
    S, slots = layout.source.count, layout.source.count + layout.target.count
    memory = Slice(0, S, name="pointed_at")(x) if head.points else None
    predicted = Slice(S, slots, name="predicted")(x)
    return with_row_head(row, predicted, head, "lstm_prefix_decoder", memory)


def encoder_decoder(layout: RowLayout, sizes: BodySizes, head: Head, layers: Layers = PLAIN) -> keras.Model:
    """Bidirectional encoder, and a decoder that attends to it (Luong et al. 2015, global attention)."""
    row = embedded_row(layout, sizes, layers, _uniform())
    memory = _both_ways(row.source, sizes, layers)
    x = keras.layers.Dropout(sizes.dropout, name="target_dropout")(row.target)
    for i in range(sizes.layers):
        x = layers.lstm(sizes.width, return_sequences=True, name=f"decoder_{i}")(x)
        x = keras.layers.Dropout(sizes.dropout, name=f"decoder_{i}_dropout")(x)
    context = SourceAttention(name="source_attention")(x, memory, row.padding)
    both = keras.layers.Concatenate(axis=-1, name="with_context")([x, context])
    x = keras.layers.Dense(sizes.width, activation="tanh", name="attentional_state")(both)
    return with_row_head(row, x, head, "lstm_encoder_decoder", memory)


def _both_ways(x: Any, sizes: BodySizes, layers: Layers) -> Any:
    x = keras.layers.Dropout(sizes.dropout, name="embedding_dropout")(x)
    for i in range(sizes.layers):
        forward = layers.lstm(sizes.width, return_sequences=True, name=f"layer_{i}")(x)
        h = Reverse(name=f"layer_{i}_turned")(x)
        h = layers.lstm(sizes.width, return_sequences=True, name=f"layer_{i}_backward")(h)
        backward = Reverse(name=f"layer_{i}_turned_back")(h)
        x = keras.layers.Add(name=f"layer_{i}_both")([forward, backward])
        x = keras.layers.Dropout(sizes.dropout, name=f"layer_{i}_dropout")(x)
    return x


def _uniform() -> Any:
    """As `tf_dist.models.lstm`: nothing normalizes what an LSTM reads, or what tied embeddings multiply."""
    return keras.initializers.RandomUniform(-0.1, 0.1)
