"""The LM head (last product of a language model), separate, so that a loss can compute it in chunks.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf


@dataclass(frozen=True)
class LanguageModelHead:
    """The factors of a model's logits: (B, T, D) hidden states, and the embedding matrix.

    trunk: token ids (B, T) -> states (B, T, D), with the layers of the full model.
    embedding: used in reverse.
    """

    trunk: keras.Model
    embedding: keras.layers.ReversibleEmbedding

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.embedding.input_dim)

    def table(self) -> Any:
        """The matrix that multiplies the states, (V, D) float32."""
        if self.embedding.tie_weights:
            return tf.convert_to_tensor(self.embedding.embeddings)
        return tf.transpose(tf.convert_to_tensor(self.embedding.reverse_embeddings))


def with_head(
    tokens_BxT: tf.Tensor, states_BxTxD: tf.Tensor, embedding: keras.layers.ReversibleEmbedding, name: str
) -> keras.Model:
    """The model from token ids to logits (B, T, V), with its `LanguageModelHead` attached."""
    model = keras.Model(tokens_BxT, embedding(states_BxTxD, reverse=True), name=name)
    return with_known_head(
        model, LanguageModelHead(keras.Model(tokens_BxT, states_BxTxD, name=f"{name}_trunk"), embedding)
    )


def with_known_head(model: keras.Model, head: LanguageModelHead) -> keras.Model:
    """Attach a `LanguageModelHead` to a model, and return it."""
    model.tf_dist_head = head
    return model


def head_of(model: keras.Model) -> LanguageModelHead | None:
    """The head of a model from `with_head`, or None."""
    head = getattr(model, "tf_dist_head", None)
    return head if isinstance(head, LanguageModelHead) else None
