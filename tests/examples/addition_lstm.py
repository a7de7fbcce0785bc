"""After keras.io's "Sequence to sequence learning for performing number addition".

RepeatVector, a softmax for each character.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(6)
CHARACTERS = "0123456789+ "


def one_hot(texts, length):
    ids = np.array([[CHARACTERS.index(c) for c in text.ljust(length)] for text in texts])
    return np.eye(len(CHARACTERS), dtype="float32")[ids]


numbers = np.random.default_rng(6).integers(0, 100, size=(38, 2))
x = one_hot([f"{a}+{b}"[::-1] for a, b in numbers], 5)
y = one_hot([str(a + b) for a, b in numbers], 3)
model = keras.Sequential(
    [
        keras.Input((5, len(CHARACTERS))),
        layers.LSTM(10),
        layers.RepeatVector(3),
        layers.LSTM(10, return_sequences=True),
        layers.Dense(len(CHARACTERS), activation="softmax"),
    ]
)
optimizer = tf_dist.distribute(keras.optimizers.Adam(0.01, epsilon=1e-3), comm)
model.compile(optimizer, loss="categorical_crossentropy", metrics=["accuracy"])
history = model.fit(
    x[:30], y[:30], batch_size=7, epochs=2, validation_data=(x[30:], y[30:]), shuffle=False, verbose=0
)
results = {"history": history.history, "weights": model.get_weights()}
