"""After keras.io's "Text classification with Transformer": blocks as layers of one's own."""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers, ops

keras.utils.set_random_seed(2)
T, V = 10, 20


class Block(layers.Layer):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.attention = layers.MultiHeadAttention(heads, width // heads)
        self.feed_forward = keras.Sequential([layers.Dense(hidden, activation="gelu"), layers.Dense(width)])
        self.norms = [layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]

    def call(self, x):
        x = self.norms[0](x + self.attention(x, x))
        return self.norms[1](x + self.feed_forward(x))


class Places(layers.Layer):
    def __init__(self, length, vocabulary, width):
        super().__init__()
        self.tokens, self.places = layers.Embedding(vocabulary, width), layers.Embedding(length, width)

    def call(self, x):
        return self.tokens(x) + self.places(ops.arange(ops.shape(x)[-1]))


numbers = np.random.default_rng(2)
reviews = numbers.integers(1, V, size=(36, T))
liked = (reviews > V // 2).sum(axis=1) > T // 2
inputs = keras.Input((T,), dtype="int32")
h = Block(8, 2, 16)(Places(T, V, 8)(inputs))
h = layers.GlobalAveragePooling1D()(h)
h = layers.Dense(8, activation="tanh")(h)
model = keras.Model(inputs, layers.Dense(2, activation="softmax")(h))
optimizer = tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm)
model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
history = model.fit(
    tf_dist.shard((reviews[:26], liked[:26].astype("int32")), comm, batch_size=8, shuffle=False),
    epochs=2,
    validation_data=(reviews[26:], liked[26:].astype("int32")),
    verbose=0,
)
results = {"history": history.history, "weights": model.get_weights()}
