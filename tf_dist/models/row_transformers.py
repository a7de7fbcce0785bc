"""Transformers of rows: an encoder, a prefix decoder and an encoder-decoder.

All carry one array of slots from layer to layer, so that a pipeline can be cut between any two: in an
encoder-decoder it holds the source's states before the target's, and each half of the layers changes its own.

Legend: B rows, S source and T target slots, D width.
"""

from __future__ import annotations

from typing import Any

import keras

from tf_dist.models.body_sizes import BodySizes
from tf_dist.models.row_embedding import EmbeddedRow, embedded_row, marked_source
from tf_dist.models.row_heads import with_row_head
from tf_dist.models.row_layers import DocumentBias, JoinSlots, PrefixBias, Slice
from tf_dist.models.row_layout import SPANS, Head, RowLayout
from tf_dist.models.transformer import (
    PLAIN,
    Layers,
    added,
    at_positions,
    before,
    block,
    documents,
    feed_forward,
    final_norm,
    self_attention,
)


def encoder(
    layout: RowLayout,
    sizes: BodySizes,
    head: Head,
    layers: Layers = PLAIN,
    end_of_text: int | None = None,
) -> keras.Model:
    """A bidirectional encoder (BERT, Devlin et al. 2019; pre-norm), as deep as ``sizes.layers``.

    ``end_of_text``: as in `tf_dist.models.transformer.build`, for rows of several documents.
    """
    row = embedded_row(layout, sizes, layers)
    bias, places = row.padding, ()
    if end_of_text is not None:
        _, places = documents(row.words, end_of_text)
        bias = bias + DocumentBias(end_of_text, causal=False, name="own_document")(row.words)
    source = marked_source(row, layout, sizes) if head.kind == SPANS else row.source
    x_BxSxD = at_positions(source, sizes, layers, places)
    for i in range(sizes.layers):
        x_BxSxD = block(x_BxSxD, sizes, f"layer_{i}", layers, bias)
    return with_row_head(row, final_norm(x_BxSxD, sizes.kind), head, "encoder")


def prefix_decoder(layout: RowLayout, sizes: BodySizes, head: Head, layers: Layers = PLAIN) -> keras.Model:
    """One stack for source and target, which sees all of the source (prefix LM, Raffel et al. 2020)."""
    row = embedded_row(layout, sizes, layers)
    bias = PrefixBias(layout.target.count, name="prefix_bias")(row.padding)
    x_BxNxD = at_positions(_joined(row, layout), sizes, layers)
    for i in range(sizes.layers):
        x_BxNxD = block(x_BxNxD, sizes, f"layer_{i}", layers, bias)
    return _with_head(row, x_BxNxD, layout, sizes, head, "prefix_decoder")


def encoder_decoder(layout: RowLayout, sizes: BodySizes, head: Head, layers: Layers = PLAIN) -> keras.Model:
    """Vaswani et al. (2017), pre-norm: ``sizes.layers`` layers of encoder, and as many of decoder."""
    row = embedded_row(layout, sizes, layers)
    x_BxNxD = at_positions(_joined(row, layout), sizes, layers)
    for i in range(sizes.layers):
        x_BxNxD = _encoder_layer(x_BxNxD, layout, sizes, i, layers, row.padding)
    for i in range(sizes.layers, 2 * sizes.layers):
        x_BxNxD = _decoder_layer(x_BxNxD, layout, sizes, i, layers, row.padding)
    return _with_head(row, x_BxNxD, layout, sizes, head, "encoder_decoder")


def _with_head(
    row: EmbeddedRow, x: Any, layout: RowLayout, sizes: BodySizes, head: Head, name: str
) -> keras.Model:
    """The head over the target's slots; of the source's, one that points reads the states as they are."""
    S = layout.source.count
    x_BxTxD = final_norm(Slice(S, _slots(layout), name="predicted")(x), sizes.kind)
    memory = Slice(0, S, name="pointed_at")(x) if head.points else None
    return with_row_head(row, x_BxTxD, head, name, memory)


def _encoder_layer(x: Any, layout: RowLayout, sizes: BodySizes, i: int, layers: Layers, padding: Any) -> Any:
    """A layer of the encoder; the target's slots pass."""
    source, target = _halves(x, layout, f"layer_{i}")
    source = block(source, sizes, f"layer_{i}", layers, padding)
    if i == sizes.layers - 1:
        source = before(source, sizes.kind, f"layer_{i}_encoder_norm")
    return JoinSlots(layout.source.count, name=f"layer_{i}_slots")(target, source)


def _decoder_layer(x: Any, layout: RowLayout, sizes: BodySizes, i: int, layers: Layers, padding: Any) -> Any:
    """Causal self-attention, attention to the source, feed-forward; the source's slots pass."""
    name, kind = f"layer_{i}", sizes.kind
    source, target = _halves(x, layout, name)
    h = self_attention(sizes, f"{name}_attention", layers)(before(target, kind, f"{name}_attention_norm"))
    target = added(target, h, sizes, f"{name}_attention")
    h = before(target, kind, f"{name}_cross_attention_norm")
    cross = layers.cross_attention(
        sizes.heads, sizes.dropout, sizes.residual_stddev, kind=kind, name=f"{name}_cross_attention"
    )
    target = added(target, cross(h, source, padding), sizes, f"{name}_cross_attention")
    target = feed_forward(target, sizes, name, layers)
    return JoinSlots(layout.source.count, name=f"{name}_slots")(target, source)


def _halves(x: Any, layout: RowLayout, name: str) -> tuple[Any, Any]:
    S = layout.source.count
    return Slice(0, S, name=f"{name}_source")(x), Slice(S, _slots(layout), name=f"{name}_target")(x)


def _slots(layout: RowLayout) -> int:
    return layout.source.count + layout.target.count


def _joined(row: EmbeddedRow, layout: RowLayout) -> Any:
    return JoinSlots(layout.source.count, name="slots")(row.target, row.source)
