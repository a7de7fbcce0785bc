"""After keras.io's "Semi-supervised image classification using contrastive pretraining with SimCLR".

Two views, a loss between all rows, a probe.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(25)


class SimCLR(keras.Model):
    def __init__(self, encoder, head, probe):
        super().__init__()
        self.encoder, self.head, self.probe = encoder, head, probe
        self.contrast = keras.metrics.Mean(name="c_loss")

    def compile(self, contrastive_optimizer, probe_optimizer):
        super().compile()
        self.contrastive_optimizer, self.probe_optimizer = contrastive_optimizer, probe_optimizer
        self.probe_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def call(self, x):
        return self.probe(self.encoder(x))

    def contrastive_loss(self, one, two):
        one, two = ops.normalize(one, axis=1), ops.normalize(two, axis=1)
        similarities = ops.matmul(one, ops.transpose(two)) / 0.1
        labels = ops.arange(ops.shape(one)[0])
        losses = [
            keras.losses.sparse_categorical_crossentropy(labels, each, from_logits=True)
            for each in (similarities, ops.transpose(similarities))
        ]
        return ops.mean((losses[0] + losses[1]) / 2)

    def train_step(self, data):
        (first, second), labels = data
        with tf.GradientTape() as tape:
            loss = self.contrastive_loss(
                *(self.head(self.encoder(view, training=True)) for view in (first, second))
            )
        weights = self.encoder.trainable_weights + self.head.trainable_weights
        self.contrastive_optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))
        self.contrast.update_state(loss)
        with tf.GradientTape() as tape:
            probed = self.probe_loss(labels, self.probe(self.encoder(first, training=False)))
        weights = self.probe.trainable_weights
        self.probe_optimizer.apply_gradients(zip(tape.gradient(probed, weights), weights))
        return {"c_loss": self.contrast.result()}


numbers = np.random.default_rng(25)
images, labels = numbers.normal(size=(24, 6)), numbers.integers(3, size=24)
views = tuple((images + 0.1 * numbers.normal(size=images.shape)).astype("float32") for _ in range(2))
encoder = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="tanh")])
head, probe = (keras.Sequential([keras.Input((8,)), layers.Dense(width)]) for width in (4, 3))
model = SimCLR(encoder, head, probe)
model.compile(*(tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm) for _ in range(2)))
history = model.fit(views, labels, batch_size=8, epochs=2, shuffle=False, verbose=0)
results = {"history": history.history, "weights": model.get_weights()}
