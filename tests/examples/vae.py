"""After keras.io's "Variational AutoEncoder".

A sampling layer, three trackers. Samples are random, so ranks are compared.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(9)
by_value = False


class Sampling(layers.Layer):
    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(9)

    def call(self, inputs):
        mean, log_variance = inputs
        return mean + ops.exp(0.5 * log_variance) * keras.random.normal(ops.shape(mean), seed=self.seeds)


class VAE(keras.Model):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.trackers = {
            name: keras.metrics.Mean(name=name) for name in ("loss", "reconstruction_loss", "kl_loss")
        }

    @property
    def metrics(self):
        return list(self.trackers.values())

    def call(self, x):
        return self.decoder(self.encoder(x)[2])

    def train_step(self, data):
        with tf.GradientTape() as tape:
            mean, log_variance, z = self.encoder(data)
            rebuilt = self.decoder(z)
            by_pixel = keras.losses.binary_crossentropy(data, rebuilt)
            reconstruction = ops.mean(ops.sum(by_pixel, axis=(1, 2)))
            kl = -0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance))
            kl = ops.mean(ops.sum(kl, axis=1))
            total = reconstruction + kl
        self.optimizer.apply_gradients(
            zip(tape.gradient(total, self.trainable_weights), self.trainable_weights)
        )
        for name, value in zip(self.trackers, (total, reconstruction, kl)):
            self.trackers[name].update_state(value)
        return {name: tracker.result() for name, tracker in self.trackers.items()}


images = np.random.default_rng(9).random((26, 6, 6, 1)).astype("float32")
inputs = keras.Input((6, 6, 1))
h = layers.Dense(8, activation="tanh")(layers.Flatten()(layers.Conv2D(4, 3)(inputs)))
mean, log_variance = layers.Dense(2)(h), layers.Dense(2)(h)
encoder = keras.Model(inputs, [mean, log_variance, Sampling()([mean, log_variance])])
decoder = keras.Sequential(
    [keras.Input((2,)), layers.Dense(36, activation="sigmoid"), layers.Reshape((6, 6, 1))]
)
vae = VAE(encoder, decoder)
vae.compile(tf_dist.distribute(keras.optimizers.Adam(0.003), comm))
history = vae.fit(images, epochs=2, batch_size=8, verbose=0)
results = {"history": history.history, "weights": vae.get_weights()}
