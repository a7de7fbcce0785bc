"""After keras.io's "English-to-Spanish translation with a Transformer".

Named inputs, masks of both sides, padding ignored.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers

keras.utils.set_random_seed(7)
V, W = 14, 8
numbers = np.random.default_rng(7)


def sentences(rows, length):
    ids = numbers.integers(1, V, size=(rows, length))
    ids[np.arange(length) >= numbers.integers(2, length + 1, size=rows)[:, None]] = 0
    return ids


source, target = sentences(29, 7), sentences(29, 8)
pairs = tf.data.Dataset.from_tensor_slices(
    ({"encoder_inputs": source, "decoder_inputs": target[:, :-1]}, target[:, 1:])
).batch(8)

encoder_inputs = keras.Input((None,), dtype="int64", name="encoder_inputs")
decoder_inputs = keras.Input((None,), dtype="int64", name="decoder_inputs")
x = layers.Embedding(V, W, mask_zero=True)(encoder_inputs)
x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
encoded = layers.LayerNormalization()(x + layers.Dense(W, activation="gelu")(x))
h = layers.Embedding(V, W, mask_zero=True)(decoder_inputs)
h = layers.LayerNormalization()(h + layers.MultiHeadAttention(2, 4)(h, h, use_causal_mask=True))
h = layers.LayerNormalization()(h + layers.MultiHeadAttention(2, 4)(h, encoded))
model = keras.Model([encoder_inputs, decoder_inputs], layers.Dense(V, activation="softmax")(h))
optimizer = tf_dist.distribute(keras.optimizers.RMSprop(0.003, epsilon=1e-3), comm)
model.compile(
    optimizer, loss=keras.losses.SparseCategoricalCrossentropy(ignore_class=0), metrics=["accuracy"]
)
history = model.fit(pairs, epochs=2, validation_data=pairs.take(2), verbose=0)
results = {"history": history.history, "weights": model.get_weights()}
