"""After keras.io's "Text generation with a miniature GPT".

Two outputs of which one has a loss, a callback that predicts.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(4)
T, V, W = 8, 15, 8


class Decoder(layers.Layer):
    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, W // 2)
        self.hidden, self.out = layers.Dense(16, activation="gelu"), layers.Dense(W)
        self.norms = [layers.LayerNormalization(), layers.LayerNormalization()]

    def call(self, x):
        x = self.norms[0](x + self.attention(x, x, use_causal_mask=True))
        return self.norms[1](x + self.out(self.hidden(x)))


class Embedded(layers.Layer):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = layers.Embedding(V, W), layers.Embedding(T, W)

    def call(self, x):
        return self.tokens(x) + self.places(ops.arange(ops.shape(x)[-1]))


class Generator(keras.callbacks.Callback):
    """Continues a prompt greedily after each epoch."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def on_epoch_end(self, epoch, logs=None):
        tokens = [1, 2]
        while len(tokens) < T:
            padded = np.array([tokens + [0] * (T - len(tokens))])
            logits, _ = self.model.predict(padded, verbose=0)
            tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
        self.texts.append(tokens)


text = np.random.default_rng(4).integers(1, V, size=(26, T + 1))
dataset = (
    tf.data.Dataset.from_tensor_slices(text)
    .batch(6)
    .map(lambda rows: (rows[:, :-1], rows[:, 1:]))
    .prefetch(2)
)
inputs = keras.Input((T,), dtype="int32")
hidden = Decoder()(Embedded()(inputs))
model = keras.Model(inputs, [layers.Dense(V)(hidden), hidden])
optimizer = tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm)
model.compile(optimizer, loss=[keras.losses.SparseCategoricalCrossentropy(from_logits=True), None])
generator = Generator()
history = model.fit(dataset, epochs=2, callbacks=[generator], verbose=0)
results = {"history": history.history, "weights": model.get_weights(), "texts": generator.texts}
