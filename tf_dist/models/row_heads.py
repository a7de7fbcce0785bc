"""The last layers of a model of rows: logits of tokens, classes or spans, or frames.

Legend: B rows, S source slots, T target slots, D width, C classes, M values of a frame.
"""

from __future__ import annotations

from typing import Any

import keras

from tf_dist.models.lm_head import with_head
from tf_dist.models.model_outputs import FRAMES, with_outputs
from tf_dist.models.pointer_generator import PointerGenerator
from tf_dist.models.row_embedding import EmbeddedRow
from tf_dist.models.row_layers import ConcatPooling, SpanLogits
from tf_dist.models.row_layout import CLASSES, SPANS, TOKENS, Head
from tf_dist.models.transformer import normal


def with_row_head(row: EmbeddedRow, states: Any, head: Head, name: str, memory: Any = None) -> keras.Model:
    """The model from words of rows to predictions.

    Args:
        row: the entrance of the model.
        states: of source slots, (B, S, D), for classes and spans; else of the slots that are predicted.
        head: what is predicted.
        name: of the model.
        memory: states of the source, (B, S, D), for a head that points to it.
    """
    if head.points:
        logits = row.embedding(states, reverse=True)
        point = PointerGenerator(logits.shape[-1], name="pointer_generator")
        return keras.Model(row.words, point(logits, states, memory, row.own, row.padding), name=name)
    if head.kind == TOKENS:
        return with_head(row.words, states, row.embedding, name)
    if head.kind == CLASSES:
        pooled = ConcatPooling(name="pooling")(states, row.padding)
        return keras.Model(row.words, _dense(head.size, "classifier")(pooled), name=name)
    if head.kind == SPANS:
        spans_Bx2xS = SpanLogits(name="span_logits")(_dense(2, "span")(states), row.padding)
        return keras.Model(row.words, spans_Bx2xS, name=name)
    frames_BxTxM = _dense(head.size, "frames")(states)
    return with_outputs(keras.Model(row.words, frames_BxTxM, name=name), FRAMES)


def _dense(units: int, name: str) -> keras.layers.Layer:
    return keras.layers.Dense(units, kernel_initializer=normal(0.02), name=name)
