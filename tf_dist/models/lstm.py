"""An LSTM language model (Hochreiter & Schmidhuber 1997; as in Zaremba et al. 2014).

Legend: B rows, T tokens, H units of each layer, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from tf_dist.models import fast_lstm
from tf_dist.models.lm_head import with_head


def build(
    vocab_size: int,
    seq_len: int,
    layer_count: int,
    width: int,
    dropout: float = 0.0,
    tie_embeddings: bool = True,
    recurrent_layer: Callable[..., Any] = fast_lstm.LSTM,
    embedding_layer: Callable[..., Any] = layers.ReversibleEmbedding,
) -> keras.Model:
    """An LSTM language model, (B, T) token ids -> (B, T, V) logits.

    Dropout is applied before, between and after the layers, never inside the recurrence. With tied
    embeddings the output layer reuses the embedding matrix (Press & Wolf 2017). With
    ``recurrent_layer=keras.layers.LSTM`` the model has the same variables, and is slower on a CPU.
    `tf_dist.layers` has tensor-parallel layers with the same arguments.
    """
    tokens_BxT = keras.Input((seq_len,), dtype="int32", name="tokens")
    embedding = embedding_layer(
        vocab_size,
        width,
        tie_weights=tie_embeddings,
        embeddings_initializer=keras.initializers.RandomUniform(-0.1, 0.1),
        name="embedding",
    )
    x_BxTxH = layers.Dropout(dropout, name="embedding_dropout")(embedding(tokens_BxT))
    for i in range(layer_count):
        x_BxTxH = recurrent_layer(width, return_sequences=True, name=f"layer_{i}")(x_BxTxH)
        x_BxTxH = layers.Dropout(dropout, name=f"layer_{i}_dropout")(x_BxTxH)
    return with_head(tokens_BxT, x_BxTxH, embedding, "lstm")


def parameter_count(vocab_size: int, layer_count: int, width: int, tie_embeddings: bool = True) -> int:
    """P = V H (twice if untied) + L 4 H (2 H + 1): the input of every layer is as wide as the layer."""
    embeddings = vocab_size * width * (1 if tie_embeddings else 2)
    return embeddings + layer_count * 4 * width * (2 * width + 1)
