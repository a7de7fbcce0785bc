"""After keras.io's "Automatic Speech Recognition using CTC".

A loss function of one's own around CTC, recurrent layers, a normalised input.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(19)
FRAMES, FEATURES, LETTERS = 10, 4, 5


def ctc(y_true, y_pred):
    rows = ops.shape(y_true)[0]
    frames = ops.full((rows,), FRAMES, dtype="int32")
    lengths = ops.sum(ops.cast(ops.not_equal(y_true, 0), "int32"), axis=1)
    return ops.ctc_loss(ops.cast(y_true, "int32"), y_pred, lengths, frames, mask_index=0)


numbers = np.random.default_rng(19)
sounds = numbers.normal(size=(26, FRAMES, FEATURES)).astype("float32")
texts = numbers.integers(1, LETTERS, size=(26, 4))
texts[np.arange(4) >= numbers.integers(1, 5, size=26)[:, None]] = 0
inputs = keras.Input((FRAMES, FEATURES))
h = layers.BatchNormalization()(layers.Conv1D(6, 3, padding="same", use_bias=False)(inputs))
h = layers.Bidirectional(layers.GRU(4, return_sequences=True))(layers.Activation("tanh")(h))
model = keras.Model(inputs, layers.Dense(LETTERS)(h))
model.compile(tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm), loss=ctc)
pairs = tf.data.Dataset.from_tensor_slices((sounds, texts)).batch(8)
history = model.fit(pairs, epochs=2, validation_data=pairs.take(1), verbose=0)
results = {"history": history.history, "weights": model.get_weights()}
