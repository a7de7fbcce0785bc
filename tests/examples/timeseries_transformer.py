"""After keras.io's "Timeseries classification with a Transformer model".

Attention and convolutions of width 1.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(14)
numbers = np.random.default_rng(14)
y = numbers.integers(2, size=34)
x = (np.sin(np.arange(10) * (1 + y[:, None])) + numbers.normal(0, 0.1, size=(34, 10)))[..., None].astype(
    "float32"
)
inputs = keras.Input((10, 1))
h = inputs
for _ in range(2):
    attended = layers.LayerNormalization(epsilon=1e-6)(layers.MultiHeadAttention(2, 4)(h, h) + h)
    h = layers.Conv1D(4, 1, activation="gelu")(attended)
    h = layers.LayerNormalization(epsilon=1e-3)(layers.Conv1D(1, 1)(h) + attended)
h = layers.GlobalAveragePooling1D(data_format="channels_first")(h)
h = layers.Dense(8, activation="gelu")(h)
model = keras.Model(inputs, layers.Dense(2, activation="softmax")(h))
optimizer = tf_dist.distribute(keras.optimizers.Adam(0.001, epsilon=1e-3), comm)
model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["sparse_categorical_accuracy"])
history = model.fit(
    x, y, validation_split=0.2, epochs=2, batch_size=8, shuffle=False, verbose=0,
    callbacks=[keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, factor=0.5)],
)  # fmt: skip
results = {"history": history.history, "weights": model.get_weights()}
