"""After keras.io's "End-to-end Masked Language Modeling with BERT".

Weights select the masked tokens, train_step uses them.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers

keras.utils.set_random_seed(8)
T, V, W, MASK = 8, 16, 8, 15
loss_of = keras.losses.SparseCategoricalCrossentropy(reduction=None)


class MaskedLanguageModel(keras.Model):
    def __init__(self, *arguments, **words):
        super().__init__(*arguments, **words)
        self.tracker = keras.metrics.Mean(name="loss")

    def train_step(self, data):
        features, labels, sample_weight = data
        with tf.GradientTape() as tape:
            predictions = self(features, training=True)
            loss = loss_of(labels, predictions, sample_weight=sample_weight)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        self.tracker.update_state(loss, sample_weight=sample_weight)
        return {"loss": self.tracker.result()}

    @property
    def metrics(self):
        return [self.tracker]


numbers = np.random.default_rng(8)
labels = numbers.integers(1, MASK, size=(28, T))
masked = numbers.random((28, T)) < 0.3
x = np.where(masked, MASK, labels)
inputs = keras.Input((T,), dtype="int64")
h = layers.Embedding(V, W)(inputs)
h = layers.LayerNormalization()(h + layers.MultiHeadAttention(2, 4)(h, h))
h = layers.LayerNormalization()(h + layers.Dense(W, activation="gelu")(h))
model = MaskedLanguageModel(inputs, layers.Dense(V, activation="softmax")(h))
model.compile(tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm))
dataset = tf.data.Dataset.from_tensor_slices((x, labels, masked.astype("float32"))).batch(8)
history = model.fit(dataset, epochs=2, verbose=0)
results = {"history": history.history, "weights": model.get_weights()}
