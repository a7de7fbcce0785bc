"""After keras.io's "WGAN-GP".

More steps of the critic than of the generator, a gradient penalty. Noise comes with the data.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(12)


class WGAN(keras.Model):
    def __init__(self, critic, generator):
        super().__init__()
        self.critic, self.generator = critic, generator

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

    def penalty(self, real, fake, mixture):
        mixed = real + mixture * (fake - real)
        with tf.GradientTape() as tape:
            tape.watch(mixed)
            score = self.critic(mixed, training=True)
        norm = ops.sqrt(ops.sum(ops.square(tape.gradient(score, mixed)), axis=1) + 1e-12)
        return ops.mean((norm - 1.0) ** 2)

    def train_step(self, data):
        (real, noise, mixture), _ = data
        for _ in range(2):
            with tf.GradientTape() as tape:
                fake = self.generator(noise, training=True)
                wasserstein = ops.mean(self.critic(fake)) - ops.mean(self.critic(real))
                d_loss = wasserstein + 10.0 * self.penalty(real, fake, mixture)
            weights = self.critic.trainable_variables
            self.d_optimizer.apply_gradients(zip(tape.gradient(d_loss, weights), weights))
        with tf.GradientTape() as tape:
            g_loss = -ops.mean(self.critic(self.generator(noise, training=True)))
        weights = self.generator.trainable_variables
        self.g_optimizer.apply_gradients(zip(tape.gradient(g_loss, weights), weights))
        return {"d_loss": d_loss, "g_loss": g_loss}


numbers = np.random.default_rng(12)
real, noise, mixture = (numbers.normal(size=(24, width)).astype("float32") for width in (6, 3, 1))
critic = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(1)])
generator = keras.Sequential([keras.Input((3,)), layers.Dense(8, activation="tanh"), layers.Dense(6)])
wgan = WGAN(critic, generator)
wgan.compile(
    tf_dist.distribute(keras.optimizers.Adam(0.002, beta_1=0.5, beta_2=0.9, epsilon=1e-3), comm),
    tf_dist.distribute(keras.optimizers.Adam(0.002, beta_1=0.5, beta_2=0.9, epsilon=1e-3), comm),
)
history = wgan.fit((real, noise, mixture), real, batch_size=8, epochs=2, shuffle=False, verbose=0)
results = {"history": history.history, "weights": wgan.get_weights()}
