"""Pointer-generator (See et al. 2017): a decoder that may also copy a token of its source.

Legend: B rows, S source slots, T target slots, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_dist.models.incremental import Span

# Of the gate before training: 0.88 of the probability is the vocabulary's (sigmoid), which is learnt first.
GENERATES = 2.0
# What no side gives any probability.
LEAST = 1e-9


@keras.saving.register_keras_serializable("tf_dist")
class PointerGenerator(keras.layers.Layer):
    """Mixes what a decoder generates with where it points to in its source.

        p(w) = g softmax(logits)(w) + (1 - g) sum of the attention to source slots whose token is w

    Args:
        vocab_size: V.
        stddev: of initial weights.
    """

    def __init__(self, vocab_size: int, stddev: float = 0.02, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.stddev = vocab_size, stddev

    def build(
        self, logits_shape: Any, states_shape: Any, memory_shape: Any, ids_shape: Any, bias_shape: Any
    ) -> None:
        """Create the projection of queries, and the gate."""
        begin = keras.initializers.RandomNormal(stddev=self.stddev)
        self.query = keras.layers.Dense(
            memory_shape[-1], use_bias=False, kernel_initializer=begin, name="query"
        )
        begin = keras.initializers.RandomNormal(stddev=self.stddev)
        self.gate = keras.layers.Dense(
            1, kernel_initializer=begin, bias_initializer=keras.initializers.Constant(GENERATES), name="gate"
        )
        self.query.build(states_shape)
        self.gate.build(states_shape)
        self._source = tuple(memory_shape[1:])

    def call(self, logits: Any, states: Any, memory: Any, ids: Any, bias: Any) -> Any:
        """Return logarithms of probabilities, (B, T, V) float32.

        Args:
            logits: of the vocabulary, (B, T, V).
            states: of the decoder, (B, T, D).
            memory: states of the source, (B, S, D).
            ids: tokens of the source, (B, S) int32.
            bias: of attention to the source: 0 or `MASKED`, (B, 1, 1, S).
        """
        scale = float(memory.shape[-1]) ** -0.5
        scores_BxTxS = tf.cast(tf.matmul(self.query(states), memory, transpose_b=True), tf.float32)
        attention_BxTxS = tf.nn.softmax(scores_BxTxS * scale + tf.cast(bias, tf.float32)[:, 0])
        # A product, and no scatter: additions to one token come in the order of the slots.
        copied_BxTxV = tf.matmul(attention_BxTxS, tf.one_hot(ids, self.vocab_size))
        generates_BxTx1 = tf.sigmoid(tf.cast(self.gate(states), tf.float32))
        generated_BxTxV = tf.nn.softmax(tf.cast(logits, tf.float32))
        mixed_BxTxV = generates_BxTx1 * generated_BxTxV + (1 - generates_BxTx1) * copied_BxTxV
        return tf.math.log(mixed_BxTxV + LEAST)

    # Incremental (`tf_dist.models.incremental`): the source is kept.
    bounded = True
    reads_ids = True

    def begin(self, batch: int, length: int) -> Any:
        """Return the cache: the source's states, tokens and padding."""
        S, D = self._source
        zeros = tf.zeros((batch, S, D), self.compute_dtype)
        return zeros, tf.zeros((batch, S), tf.int32), tf.zeros((batch, 1, 1, S))

    def step(self, *inputs: Any, cache: Any, span: Span) -> tuple[Any, Any]:
        """Return the logarithms of new target slots, and the cache with the source once given."""
        logits, states, memory, ids, bias = inputs
        if memory is not None:
            cache = tf.cast(memory, self.compute_dtype), ids, bias
        return self.call(logits, states, *cache), cache

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "vocab_size": self.vocab_size, "stddev": self.stddev}
