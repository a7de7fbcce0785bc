"""After keras.io's "Metric learning for image similarity search".

Every row is compared with all rows of its batch.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(24)


class Embedder(keras.Model):
    def train_step(self, data):
        anchors, positives = data[0], data[1]
        with tf.GradientTape() as tape:
            a, b = self(anchors, training=True), self(positives, training=True)
            similarities = ops.einsum("ae,pe->ap", a, b) / 0.2
            labels = ops.arange(ops.shape(similarities)[0])
            loss = self.compute_loss(y=labels, y_pred=similarities)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


numbers = np.random.default_rng(24)
anchors = numbers.normal(size=(24, 5)).astype("float32")
positives = (anchors + 0.1 * numbers.normal(size=anchors.shape)).astype("float32")
inputs = keras.Input((5,))
h = layers.Dense(4)(layers.Dense(6, activation="tanh")(inputs))
model = Embedder(inputs, layers.UnitNormalization()(h))
model.compile(
    tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
history = model.fit(anchors, positives, batch_size=8, epochs=2, shuffle=False, verbose=0)
results = {"history": history.history, "weights": model.get_weights()}
