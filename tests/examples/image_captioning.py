"""After keras.io's "Image Captioning".

A model without a call(), several captions for an image, losses and accuracy over a mask.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(18)
V, W, CAPTIONS, T = 12, 6, 2, 6


class Captioner(keras.Model):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.loss_tracker, self.acc_tracker = keras.metrics.Mean(name="loss"), keras.metrics.Mean(name="acc")

    def loss_and_accuracy(self, image, caption, training):
        predicted = self.decoder([caption[:, :-1], self.encoder(image, training=training)], training=training)
        truth, mask = caption[:, 1:], ops.not_equal(caption[:, 1:], 0)
        mask = ops.cast(mask, "float32")
        loss = ops.sum(self.loss(truth, predicted) * mask) / ops.sum(mask)
        right = ops.cast(ops.equal(truth, ops.cast(ops.argmax(predicted, axis=2), truth.dtype)), "float32")
        return loss, ops.sum(right * mask) / ops.sum(mask)

    def train_step(self, data):
        images, captions = data
        total, accuracy = 0.0, 0.0
        for i in range(CAPTIONS):
            with tf.GradientTape() as tape:
                loss, right = self.loss_and_accuracy(images, captions[:, i, :], True)
            total, accuracy = total + loss, accuracy + right
            variables = self.encoder.trainable_variables + self.decoder.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        self.loss_tracker.update_state(total)
        self.acc_tracker.update_state(accuracy / CAPTIONS)
        return {"loss": self.loss_tracker.result(), "acc": self.acc_tracker.result()}

    @property
    def metrics(self):
        return [self.loss_tracker, self.acc_tracker]


numbers = np.random.default_rng(18)
images = numbers.normal(size=(22, 5)).astype("float32")
captions = numbers.integers(1, V, size=(22, CAPTIONS, T))
captions[np.arange(T) >= numbers.integers(2, T + 1, size=(22, CAPTIONS, 1))] = 0
encoder = keras.Sequential([keras.Input((5,)), layers.Dense(W, activation="tanh")])
words, picture = keras.Input((None,), dtype="int64"), keras.Input((W,))
h = layers.GRU(W, return_sequences=True)(layers.Embedding(V, W, mask_zero=True)(words), initial_state=picture)
decoder = keras.Model([words, picture], layers.Dense(V, activation="softmax")(h))
model = Captioner(encoder, decoder)
model.compile(
    tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=False, reduction=None),
)
history = model.fit(tf.data.Dataset.from_tensor_slices((images, captions)).batch(8), epochs=2, verbose=0)
results = {"history": history.history, "weights": model.get_weights()}
