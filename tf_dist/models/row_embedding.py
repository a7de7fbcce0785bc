"""The first layers of a model of rows: slots of source and target as vectors of the model's width.

Legend: B rows, W words, S source and T target slots, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras

from tf_dist.models.body_sizes import BodySizes
from tf_dist.models.row_layers import PADDING_WORD, InQuestion, PaddingBias, Slice, UnpackVectors
from tf_dist.models.row_layout import RowLayout, Slots
from tf_dist.models.transformer import PLAIN, Layers, normal


class EmbeddedRow(NamedTuple):
    """A row at the entrance of a body.

    words: the model's input, (B, W). own: those of the source. padding: bias of the source's padding,
    (B, 1, 1, S). source: (B, S, D). target: (B, T, D), or None. embedding: the table, None where neither side
    is text.
    """

    words: Any
    own: Any
    padding: Any
    source: Any
    target: Any
    embedding: Any


def embedded_row(
    layout: RowLayout, sizes: BodySizes, layers: Layers = PLAIN, initializer: Any = None
) -> EmbeddedRow:
    """Make the input of a model, and the vectors of its slots, without positions.

    Text of both sides has one table. Vectors, stacked frames or patches, are projected linearly: a strided
    convolution whose kernel is as wide as its stride (Dosovitskiy et al. 2021). The table begins as
    ``initializer`` says, or as GPT-2's: small, for bodies that normalize it.
    """
    words = keras.Input((layout.words,), dtype="int32", name="row")
    source, target = layout.source, layout.target
    embedding = _table(layout, sizes, layers, initializer or normal(0.02))
    own = Slice(0, source.words, name="source")(words) if target.count else words
    padding = _padding(source, layout.pad)(own)
    if not target.count:
        return EmbeddedRow(
            words, own, padding, _vectors(own, source, sizes, embedding, "source"), None, embedding
        )
    if not (source.width or target.width):
        both = embedding(words)  # one call: a model cannot be cut between two calls of a layer
        first = Slice(0, source.count, name="source_states")(both)
        last = Slice(source.count, layout.words, name="target_states")(both)
        return EmbeddedRow(words, own, padding, first, last, embedding)
    last = Slice(source.words, layout.words, name="target")(words)
    vectors = _vectors(own, source, sizes, embedding, "source")
    return EmbeddedRow(
        words, own, padding, vectors, _vectors(last, target, sizes, embedding, "target"), embedding
    )


def marked_source(row: EmbeddedRow, layout: RowLayout, sizes: BodySizes) -> Any:
    """The source with a vector of its own added where the context repeats a token of the question."""
    marks_BxSx1 = InQuestion(layout.separator, name="in_question")(row.words)
    vectors = keras.layers.Dense(
        sizes.width, use_bias=False, kernel_initializer=normal(0.02), name="in_question_vector"
    )(marks_BxSx1)
    return keras.layers.Add(name="marked_source")([row.source, vectors])


def _table(layout: RowLayout, sizes: BodySizes, layers: Layers, initializer: Any) -> Any:
    """The embedding of token ids; None if neither side has any."""
    if layout.source.width and (layout.target.width or not layout.target.count):
        return None
    return layers.embedding(
        layout.vocab_size,
        sizes.width,
        tie_weights=sizes.tie_embeddings,
        embeddings_initializer=initializer,
        name="embedding",
    )


def _padding(slots: Slots, pad: int) -> PaddingBias:
    if slots.width:
        return PaddingBias(PADDING_WORD, Slots(1, slots.width).words, name="source_padding")
    return PaddingBias(pad, name="source_padding")


def _vectors(words: Any, slots: Slots, sizes: BodySizes, embedding: Any, name: str) -> Any:
    if not slots.width:
        return embedding(words)
    vectors = UnpackVectors(slots.width, name=f"{name}_vectors")(words)
    stem = keras.layers.Dense(sizes.width, kernel_initializer=normal(0.02), name=f"{name}_projection")
    return stem(vectors)
