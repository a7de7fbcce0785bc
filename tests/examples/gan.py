"""After keras.io's "DCGAN".

Two optimizers of its own compile(), two steps in one train_step. Noise comes with the data.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(11)


class GAN(keras.Model):
    def __init__(self, discriminator, generator):
        super().__init__()
        self.discriminator, self.generator = discriminator, generator
        self.d_loss, self.g_loss = keras.metrics.Mean(name="d_loss"), keras.metrics.Mean(name="g_loss")

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    @property
    def metrics(self):
        return [self.d_loss, self.g_loss]

    def train_step(self, data):
        real, noise = data
        rows = ops.shape(real)[0]
        images = ops.concatenate([self.generator(noise), real], axis=0)
        labels = ops.concatenate([ops.ones((rows, 1)), ops.zeros((rows, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(images))
        weights = self.discriminator.trainable_weights
        self.d_optimizer.apply_gradients(zip(tape.gradient(d_loss, weights), weights))
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(ops.zeros((rows, 1)), self.discriminator(self.generator(noise)))
        weights = self.generator.trainable_weights
        self.g_optimizer.apply_gradients(zip(tape.gradient(g_loss, weights), weights))
        self.d_loss.update_state(d_loss)
        self.g_loss.update_state(g_loss)
        return {"d_loss": self.d_loss.result(), "g_loss": self.g_loss.result()}


numbers = np.random.default_rng(11)
real, noise = numbers.random((26, 6, 6, 1)).astype("float32"), numbers.normal(size=(26, 4)).astype("float32")
discriminator = keras.Sequential(
    [
        keras.Input((6, 6, 1)),
        layers.Conv2D(4, 3, strides=2),
        layers.LeakyReLU(0.2),
        layers.Flatten(),
        layers.Dense(1, activation="sigmoid"),
    ]
)
generator = keras.Sequential(
    [
        keras.Input((4,)),
        layers.Dense(9 * 4),
        layers.Reshape((3, 3, 4)),
        layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="sigmoid"),
    ]
)
gan = GAN(discriminator, generator)
gan.compile(
    d_optimizer=tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm),
    g_optimizer=tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm),
    loss_fn=keras.losses.BinaryCrossentropy(),
)
history = gan.fit(real, noise, batch_size=8, epochs=2, shuffle=False, verbose=0)
results = {"history": history.history, "weights": gan.get_weights()}
