"""After keras.io's "Image similarity estimation using a Siamese Network with a triplet loss".

Train_step and test_step, no targets.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(17)


class Distances(layers.Layer):
    def call(self, anchor, positive, negative):
        return ops.sum(ops.square(anchor - positive), -1), ops.sum(ops.square(anchor - negative), -1)


class Siamese(keras.Model):
    def __init__(self, network, margin=0.5):
        super().__init__()
        self.network, self.margin = network, margin
        self.tracker = keras.metrics.Mean(name="loss")

    def call(self, inputs):
        return self.network(inputs)

    def loss_of(self, data):
        near, far = self.network(data)
        return ops.maximum(near - far + self.margin, 0.0)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(data)
        gradients = tape.gradient(loss, self.network.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.network.trainable_weights))
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}

    def test_step(self, data):
        self.tracker.update_state(self.loss_of(data))
        return {"loss": self.tracker.result()}

    @property
    def metrics(self):
        return [self.tracker]


numbers = np.random.default_rng(17)
triples = tuple(numbers.normal(size=(27, 5)).astype("float32") for _ in range(3))
tower = keras.Sequential([keras.Input((5,)), layers.Dense(6, activation="tanh"), layers.Dense(4)])
inputs = [keras.Input((5,), name=name) for name in ("anchor", "positive", "negative")]
model = Siamese(keras.Model(inputs, Distances()(*(tower(one) for one in inputs))))
model.compile(tf_dist.distribute(keras.optimizers.Adam(0.0005, epsilon=1e-3), comm))
dataset = tf.data.Dataset.from_tensor_slices(triples)
history = model.fit(dataset.take(20).batch(6), epochs=2, validation_data=dataset.skip(20).batch(6), verbose=0)
results = {"history": history.history, "weights": model.get_weights()}
