"""After keras.io's "Character-level text generation with LSTM".

One-hot characters, an epoch for each call of fit, sampling between.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(5)
text = "a wise man knows what he does not know and a fool knows it all " * 2
letters = sorted(set(text))
number = {letter: i for i, letter in enumerate(letters)}
T = 6
starts = range(0, len(text) - T, 3)
x = np.zeros((len(starts), T, len(letters)), "float32")
y = np.zeros((len(starts), len(letters)), "float32")
for row, start in enumerate(starts):
    for t in range(T):
        x[row, t, number[text[start + t]]] = 1
    y[row, number[text[start + T]]] = 1

model = keras.Sequential(
    [keras.Input((T, len(letters))), layers.LSTM(8), layers.Dense(len(letters), activation="softmax")]
)
optimizer = tf_dist.distribute(keras.optimizers.RMSprop(0.01, epsilon=1e-3), comm)
model.compile(optimizer, loss="categorical_crossentropy")
losses, written = [], []
for _ in range(2):
    history = model.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    losses += history.history["loss"]
    window = x[:1].copy()
    for _ in range(3):
        best = int(model.predict(window, verbose=0)[0].argmax())
        written.append(best)
        window = np.concatenate(
            [window[:, 1:], np.eye(len(letters), dtype="float32")[None, best : best + 1]], axis=1
        )
results = {"losses": losses, "written": written, "weights": model.get_weights()}
