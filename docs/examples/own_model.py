"""A language model of your own, in the current folder: any keras.Model from token ids to logits.

cd docs/examples && mpirun -np 2 tf-dist train --model own_model:build --steps 200
"""

import keras


def build(config):
    """Token ids (B, T) int32 -> logits (B, T, V); `config` has the options of `tf-dist train`."""
    tokens_BxT = keras.Input((config.seq_len,), dtype="int32")
    x_BxTxD = keras.layers.Embedding(config.vocab_size, config.width)(tokens_BxT)
    for _ in range(config.layers):
        y_BxTxD = keras.layers.Conv1D(config.width, 3, padding="causal", activation="gelu")(x_BxTxD)
        x_BxTxD = keras.layers.LayerNormalization()(x_BxTxD + keras.layers.Dropout(config.dropout)(y_BxTxD))
    return keras.Model(tokens_BxT, keras.layers.Dense(config.vocab_size)(x_BxTxD))
