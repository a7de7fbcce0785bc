"""Layers without weights that read a row: its parts, its vectors, and biases that mask attention.

Legend: B rows, W words of a row, S slots, M values of a slot, D width, Q queries, K keys.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.models.attention import MASKED, biased_attention
from tf_dist.models.incremental import Span
from tf_dist.models.kv_cache import BiasOfAll, causal_bias

PADDING_WORD = -1


def _step_of_source(layer: Any, *inputs: Any, cache: Any, span: Span) -> tuple[Any, ...]:
    """``step`` of a layer whose inputs are complete in the first call, and missing in later ones."""
    return layer.call(*inputs), cache


class _Configured(keras.layers.Layer):
    """A layer without weights, whose constructor's arguments are numbers, named in `ARGUMENTS`.

    In incremental decoding (`tf_dist.models.incremental`) the first call has the source and the first slot
    of the target, the later ones a slot of the target each: there is no new source then.
    """

    ARGUMENTS: tuple[str, ...] = ()
    bounded = True
    # In parts of a model, positions would be counted from the wrong place, and masks would have no ids.
    reads_ids = True

    def begin(self, batch: int, length: int) -> tuple[()]:
        """Return the cache: none."""
        return ()

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), **{name: getattr(self, name) for name in self.ARGUMENTS}}


@keras.saving.register_keras_serializable("tf_dist")
class Slice(_Configured):
    """Positions ``start`` to ``stop`` of the second axis: (B, N, ...) -> (B, stop - start, ...)."""

    ARGUMENTS = ("start", "stop")

    def __init__(self, start: int, stop: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.start, self.stop = start, stop

    def call(self, x_BxN: Any) -> Any:
        """Return the part."""
        return x_BxN[:, self.start : self.stop]

    def step(self, *inputs: Any, cache: Any, span: Span) -> tuple[Any, ...]:
        """Return the part that is new, None if nothing of it is; its positions are counted from its start."""
        (x_BxN,) = inputs
        if x_BxN.shape[1] == 1:
            return (x_BxN if self.start else None), cache, Span(span.start_B - self.start, span.count_B)
        count_B = tf.clip_by_value(span.count_B - self.start, 0, self.stop - self.start)
        return self.call(x_BxN), cache, Span(tf.zeros_like(count_B), count_B)


@keras.saving.register_keras_serializable("tf_dist")
class JoinSlots(_Configured):
    """The slots of a source before those of a target: (B, T, D), (B, S, D) -> (B, S + T, D).

    Args:
        sources: S.
    """

    ARGUMENTS = ("sources",)

    def __init__(self, sources: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sources = sources

    def call(self, target_BxTxD: Any, source_BxSxD: Any) -> Any:
        """Return all slots."""
        return tf.concat([source_BxSxD, target_BxTxD], axis=1)

    def step(self, *inputs: Any, cache: Any, span: Span) -> tuple[Any, ...]:
        """Return the new slots."""
        target, source = inputs
        if source is None:
            return target, cache, Span(span.start_B + self.sources, span.count_B)
        return self.call(target, source), cache, Span(span.start_B, span.count_B + self.sources)


@keras.saving.register_keras_serializable("tf_dist")
class UnpackVectors(_Configured):
    """Words of float16 pairs -> vectors: (B, S M / 2) int32 -> (B, S, M); padding becomes 0.

    Args:
        width: M.
    """

    ARGUMENTS = ("width",)
    step = _step_of_source

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width

    def call(self, words_BxN: Any) -> Any:
        """Return the vectors, in the compute dtype."""
        words_BxN = tf.convert_to_tensor(words_BxN)
        numbers_BxN = tf.where(words_BxN == PADDING_WORD, 0, words_BxN)
        values_BxNx2 = tf.cast(tf.bitcast(numbers_BxN[..., None], tf.float16), self.compute_dtype)
        return tf.reshape(values_BxNx2, (-1, words_BxN.shape[1] * 2 // self.width, self.width))


@keras.saving.register_keras_serializable("tf_dist")
class PaddingBias(_Configured):
    """0 for a slot that holds something, `MASKED` for padding: (B, S words) -> (B, 1, 1, S) float32.

    Args:
        padding: the word of padding: an id, or -1 for vectors.
        words: of a slot; its first one decides.
    """

    ARGUMENTS = ("padding", "words")
    step = _step_of_source

    def __init__(self, padding: int, words: int = 1, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        self.padding, self.words = padding, words

    def call(self, words_BxN: Any) -> Any:
        """Return the bias of attention scores."""
        first_BxS = tf.convert_to_tensor(words_BxN)[:, :: self.words]
        return tf.where(first_BxS == self.padding, MASKED, 0.0)[:, None, None, :]


@keras.saving.register_keras_serializable("tf_dist")
class PrefixBias(_Configured):
    """The bias of a prefix decoder (T5's prefix LM, Raffel et al. 2020), (B, 1, S + T, S + T) float32.

    Source slots attend to the source; target slots to the source, to themselves and to those before.

    Args:
        targets: T.
    """

    ARGUMENTS = ("targets",)

    def __init__(self, targets: int, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        self.targets = targets

    def step(self, *inputs: Any, cache: Any, span: Span) -> tuple[Any, ...]:
        """Return the bias of all positions, once."""
        return BiasOfAll(self.call(*inputs)), cache

    def call(self, padding_Bx1x1xS: Any) -> Any:
        """Return the bias, from that of the source's padding."""
        S, T = padding_Bx1x1xS.shape[-1], self.targets
        hidden = np.zeros((S + T, S + T), np.float32)
        hidden[:S, S:] = MASKED
        hidden[S:, S:] = np.triu(np.full((T, T), MASKED, np.float32), k=1)
        return tf.pad(padding_Bx1x1xS, ((0, 0), (0, 0), (0, 0), (0, T))) + hidden


@keras.saving.register_keras_serializable("tf_dist")
class DocumentBias(_Configured):
    """The bias of packed documents: a token sees its own document only; (B, T) -> (B, 1, T, T).

    Args:
        end: id of the token that ends a document, and belongs to it.
        causal: whether it sees only itself and those before it.
    """

    ARGUMENTS = ("end", "causal")

    def __init__(self, end: int, causal: bool = True, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        self.end, self.causal = end, causal

    def call(self, ids_BxT: Any) -> Any:
        """Return the bias of attention scores, float32."""
        ids_BxT = tf.convert_to_tensor(ids_BxT)
        document_BxT = _documents(ids_BxT == self.end)
        hidden_BxTxT = document_BxT[:, :, None] != document_BxT[:, None, :]
        if self.causal:
            hidden_BxTxT |= np.triu(np.full((ids_BxT.shape[1],) * 2, True), k=1)
        return tf.where(hidden_BxTxT, MASKED, 0.0)[:, None]

    # Incremental (`tf_dist.models.incremental`): where documents end is kept.
    bounded = True
    reads_ids = True

    @property
    def steps(self) -> bool:
        """Whether `step` knows these options."""
        return self.causal

    def begin(self, batch: int, length: int) -> Any:
        """Return the cache of ``batch`` rows, (B, L) bool: which tokens end a document."""
        return tf.zeros((batch, length), tf.bool)

    def step(self, ids_BxN: Any, *, cache: Any, span: Span) -> tuple[Any, Any]:
        """Return the bias of new positions, (B, 1, N, L), and the cache with these."""
        ids_BxN = tf.convert_to_tensor(ids_BxN)
        B, N = ids_BxN.shape
        places_BxN = span.positions(N)
        rows_BxN = tf.broadcast_to(tf.range(B)[:, None], (B, N))
        where = tf.stack([rows_BxN, places_BxN], axis=-1)
        ends_BxL = tf.tensor_scatter_nd_update(cache, where, ids_BxN == self.end)
        # Positions behind the new ones may hold anything: the causal bias hides them.
        document_BxL = _documents(ends_BxL)
        own_BxN = tf.gather(document_BxL, places_BxN, batch_dims=1)
        other_BxNxL = own_BxN[:, :, None] != document_BxL[:, None, :]
        later_Bx1xNxL = causal_bias(span, N, ends_BxL.shape[1], tf.float32) < 0
        return tf.where(other_BxNxL[:, None] | later_Bx1xNxL, MASKED, 0.0), ends_BxL


def _documents(ends_BxT: Any) -> Any:
    """The number of each token's document in its row, (B, T) int32, from whether it ends one."""
    return tf.cumsum(tf.cast(ends_BxT, tf.int32), axis=1, exclusive=True)


@keras.saving.register_keras_serializable("tf_dist")
class DocumentPlaces(keras.layers.Layer):
    """The position of each token in its own document: causal bias (B, 1, T, K) -> (B, T) int32.

    A token sees as many tokens as there are before it in its document, and itself.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})

    def call(self, bias_Bx1xTxK: Any) -> Any:
        """Return the positions, from 0."""
        seen_Bx1xTxK = tf.cast(tf.convert_to_tensor(bias_Bx1xTxK) == 0, tf.int32)
        return tf.reduce_sum(seen_Bx1xTxK, axis=-1)[:, 0] - 1

    # Incremental (`tf_dist.models.incremental`): the bias of new positions says it.
    bounded = False

    def begin(self, batch: int, length: int) -> tuple[()]:
        """Return the cache: none."""
        return ()

    def step(self, bias_Bx1xNxL: Any, *, cache: tuple[()], span: Span) -> tuple[Any, tuple[()]]:
        """Return the positions of new tokens, (B, N) int32."""
        return self.call(bias_Bx1xNxL), cache


@keras.saving.register_keras_serializable("tf_dist")
class ConcatPooling(keras.layers.Layer):
    """The maximum and the mean over slots that are not padding (Howard & Ruder 2018, concat pooling).

    (B, S, D) and a bias (B, 1, 1, S) -> (B, 1, 2 D). The mean knows the whole, the maximum a single mark.
    """

    def call(self, x_BxSxD: Any, padding_Bx1x1xS: Any) -> Any:
        """Return both, in the compute dtype."""
        x_BxSxD = tf.cast(x_BxSxD, tf.float32)
        held_BxSx1 = padding_Bx1x1xS[:, 0, 0, :, None] == 0
        count_Bx1x1 = tf.reduce_sum(tf.cast(held_BxSx1, tf.float32), 1, keepdims=True)
        # A row of padding has no slot: it counts for nothing, and must not divide by 0 or be -infinity.
        highest_Bx1xD = tf.reduce_max(tf.where(held_BxSx1, x_BxSxD, x_BxSxD.dtype.min), 1, keepdims=True)
        highest_Bx1xD = tf.where(count_Bx1x1 > 0, highest_Bx1xD, 0.0)
        sum_Bx1xD = tf.reduce_sum(tf.where(held_BxSx1, x_BxSxD, 0.0), 1, keepdims=True)
        both = [highest_Bx1xD, sum_Bx1xD / tf.maximum(count_Bx1x1, 1)]
        return tf.cast(tf.concat(both, axis=-1), self.compute_dtype)


@keras.saving.register_keras_serializable("tf_dist")
class SpanLogits(keras.layers.Layer):
    """Scores of each slot to be the start and the end: (B, S, 2) and a bias -> (B, 2, S) logits."""

    def call(self, scores_BxSx2: Any, padding_Bx1x1xS: Any) -> Any:
        """Return the logits, float32: in a short dtype the bias would be the only thing left of them."""
        scores_Bx2xS = tf.transpose(tf.cast(scores_BxSx2, tf.float32), (0, 2, 1))
        return scores_Bx2xS + padding_Bx1x1xS[:, 0]


@keras.saving.register_keras_serializable("tf_dist")
class InQuestion(_Configured):
    """1 for a slot of the context whose token the question has as well, else 0: (B, S) -> (B, S, 1).

    The exact match of Chen et al. (2017, DrQA): to learn that two tokens are the same takes many rows.

    Args:
        separator: id of the token behind the question.
    """

    ARGUMENTS = ("separator",)

    def __init__(self, separator: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.separator = separator

    def call(self, words_BxS: Any) -> Any:
        """Return the marks, in the compute dtype."""
        words_BxS = tf.convert_to_tensor(words_BxS)
        behind_BxS = tf.cumsum(tf.cast(words_BxS == self.separator, tf.int32), axis=1) > 0
        same_BxSxS = (words_BxS[:, :, None] == words_BxS[:, None, :]) & ~behind_BxS[:, None, :]
        marks_BxS = behind_BxS & tf.reduce_any(same_BxSxS, axis=2)
        return tf.cast(marks_BxS[:, :, None], self.compute_dtype)


@keras.saving.register_keras_serializable("tf_dist")
class Reverse(_Configured):
    """The slots in reverse order: (B, S, D) -> (B, S, D). Padding comes first then."""

    step = _step_of_source

    def call(self, x_BxSxD: Any) -> Any:
        """Return the slots, the last one first."""
        return tf.reverse(x_BxSxD, [1])


@keras.saving.register_keras_serializable("tf_dist")
class SourceAttention(_Configured):
    """The source's states, weighted by their products with a target's state (Luong et al. 2015, "dot").

    (B, T, D), (B, S, D) and a bias (B, 1, 1, S) -> (B, T, D).
    """

    def call(self, x: Any, memory: Any, padding: Any) -> Any:
        """Return the context of each target slot."""
        q, k = (tf.convert_to_tensor(one)[:, None] for one in (x, memory))
        return biased_attention(q, k, k, padding)[:, 0]

    def build(self, x_shape: Any, memory_shape: Any, padding_shape: Any) -> None:
        """Note how many states there are to attend to."""
        self._memory_shape = tuple(memory_shape[1:])

    def begin(self, batch: int, length: int) -> Any:
        """Return the cache: the source's states and the bias of its padding."""
        S, D = self._memory_shape
        return tf.zeros((batch, S, D), self.compute_dtype), tf.zeros((batch, 1, 1, S))

    def step(self, *inputs: Any, cache: Any, span: Span) -> tuple[Any, ...]:
        """Return the context of new target slots, and the cache with the source's states."""
        x, memory, padding = inputs
        cache = cache if memory is None else (tf.cast(memory, self.compute_dtype), padding)
        return self.call(x, *cache), cache
