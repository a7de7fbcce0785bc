"""After keras.io's "Imbalanced classification: credit card fraud detection".

Class weights, counting metrics, a checkpoint for each epoch.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(26)
numbers = np.random.default_rng(26)
x = numbers.normal(size=(50, 7)).astype("float32")
y = (x[:, :1] > 0.9).astype("uint8")
model = keras.Sequential(
    [keras.Input((7,)), layers.Dense(8, activation="tanh"), layers.Dense(1, activation="sigmoid")]
)
metrics = [
    keras.metrics.FalseNegatives(name="fn"),
    keras.metrics.FalsePositives(name="fp"),
    keras.metrics.TruePositives(name="tp"),
    keras.metrics.Precision(name="precision"),
    keras.metrics.Recall(name="recall"),
]
optimizer = tf_dist.distribute(keras.optimizers.Adam(0.01, epsilon=1e-3), comm)
model.compile(optimizer, loss="binary_crossentropy", metrics=metrics)
counts = np.bincount(y[:, 0])
history = model.fit(
    x[:38], y[:38], batch_size=11, epochs=2, shuffle=False, verbose=0,
    callbacks=[keras.callbacks.ModelCheckpoint("fraud-{epoch}.keras")],
    validation_data=(x[38:], y[38:]), class_weight={0: 1 / counts[0], 1: 1 / counts[1]},
)  # fmt: skip
saved = keras.saving.load_model("fraud-2.keras")
results = {"history": history.history, "weights": model.get_weights(), "saved": saved.get_weights()}
