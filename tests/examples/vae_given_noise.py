"""The VAE again, with noise that comes with the data: then numbers are those of one process."""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(10)


class VAE(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.mean, self.log_variance = (
            layers.Dense(8, activation="tanh"),
            layers.Dense(2),
            layers.Dense(2),
        )
        self.decoder = keras.Sequential(
            [layers.Dense(8, activation="tanh"), layers.Dense(12, activation="sigmoid")]
        )
        self.total_tracker, self.kl_tracker = keras.metrics.Mean(name="loss"), keras.metrics.Mean(name="kl")

    def call(self, inputs):
        x, noise = inputs
        h = self.hidden(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        return self.decoder(mean + ops.exp(0.5 * log_variance) * noise), mean, log_variance

    def train_step(self, data):
        (x, noise), _ = data
        with tf.GradientTape() as tape:
            rebuilt, mean, log_variance = self((x, noise), training=True)
            kl = ops.mean(
                ops.sum(-0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance)), axis=1)
            )
            total = 12 * ops.mean(keras.losses.binary_crossentropy(x, rebuilt)) + kl
        self.optimizer.apply_gradients(
            zip(tape.gradient(total, self.trainable_weights), self.trainable_weights)
        )
        self.total_tracker.update_state(total)
        self.kl_tracker.update_state(kl)
        return {"loss": self.total_tracker.result(), "kl": self.kl_tracker.result()}


numbers = np.random.default_rng(10)
x, noise = numbers.random((26, 12)).astype("float32"), numbers.normal(size=(26, 2)).astype("float32")
vae = VAE()
vae((x[:1], noise[:1]))
vae.compile(tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm))
history = vae.fit((x, noise), x, epochs=2, batch_size=8, shuffle=False, verbose=0)
results = {"history": history.history, "weights": vae.get_weights()}
