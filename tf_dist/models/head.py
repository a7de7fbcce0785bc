"""The last product of a language model, set apart, so that a loss can take it in parts.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf


@dataclass(frozen=True)
class Head:
    """What the logits of a model are made of: (B, T, D) states, and the embedding that is their matrix.

    trunk: token ids (B, T) -> states (B, T, D), with the layers of the whole model.
    embedding: used in reverse.
    """

    trunk: keras.Model
    embedding: keras.layers.ReversibleEmbedding

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.embedding.input_dim)

    def table(self) -> Any:
        """The matrix that states are multiplied with, (V, D) float32."""
        if self.embedding.tie_weights:
            return tf.convert_to_tensor(self.embedding.embeddings)
        return tf.transpose(tf.convert_to_tensor(self.embedding.reverse_embeddings))


def with_head(
    tokens_BxT: Any, states_BxTxD: Any, embedding: keras.layers.ReversibleEmbedding, name: str
) -> keras.Model:
    """The model from token ids to logits (B, T, V), which knows its `Head`."""
    model = keras.Model(tokens_BxT, embedding(states_BxTxD, reverse=True), name=name)
    return with_known_head(
        model, Head(keras.Model(tokens_BxT, states_BxTxD, name=f"{name}_trunk"), embedding)
    )


def with_known_head(model: keras.Model, head: Head) -> keras.Model:
    """The same model, which knows its `Head` from now on."""
    model.tf_dist_head = head
    return model


def head_of(model: keras.Model) -> Head | None:
    """The head of a model that `with_head` made, or None."""
    head = getattr(model, "tf_dist_head", None)
    return head if isinstance(head, Head) else None
