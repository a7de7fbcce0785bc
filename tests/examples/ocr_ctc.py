"""After keras.io's "OCR model for reading Captchas".

The loss is added by a layer, compile() has none, and data are one dictionary.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(20)


class CTC(layers.Layer):
    def call(self, y_true, y_pred):
        rows, frames, letters = ops.shape(y_true)[0], ops.shape(y_pred)[1], ops.shape(y_true)[1]
        lengths = ops.ones((rows,), dtype="int32") * letters
        losses = ops.ctc_loss(
            ops.cast(y_true, "int32"),
            y_pred,
            lengths,
            ops.ones((rows,), dtype="int32") * frames,
            mask_index=0,
        )
        self.add_loss(ops.mean(losses))
        return y_pred


numbers = np.random.default_rng(20)
images = numbers.random((26, 8, 4, 1)).astype("float32")
labels = numbers.integers(1, 6, size=(26, 3))
batches = tf.data.Dataset.from_tensor_slices({"image": images, "label": labels}).batch(8)
image, label = keras.Input((8, 4, 1), name="image"), keras.Input((None,), name="label")
h = layers.Conv2D(4, 3, activation="tanh", padding="same")(image)
h = layers.Dense(8, activation="tanh")(layers.Reshape((8, 16))(h))
h = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(h)
model = keras.Model([image, label], CTC()(label, layers.Dense(6)(h)))
model.compile(tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm))
history = model.fit(batches, validation_data=batches.take(2), epochs=2, verbose=0)
results = {"history": history.history, "weights": model.get_weights()}
