"""After keras.io's "Bidirectional LSTM on IMDB": padded reviews, the mask of the embedding, one sigmoid."""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(3)
numbers = np.random.default_rng(3)
reviews = [numbers.integers(1, 20, size=numbers.integers(2, 12)) for _ in range(31)]
x = keras.utils.pad_sequences(reviews, maxlen=9)
y = np.array([review.mean() > 10 for review in reviews], "float32")

inputs = keras.Input((None,), dtype="int32")
h = layers.Embedding(20, 6, mask_zero=True)(inputs)
h = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(h)
h = layers.Bidirectional(layers.LSTM(4))(h)
model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(h))
optimizer = tf_dist.distribute(keras.optimizers.Adam(0.01, epsilon=1e-3), comm)
model.compile(optimizer, loss="binary_crossentropy", metrics=["accuracy"])
history = model.fit(
    x[:23], y[:23], batch_size=8, epochs=2, validation_data=(x[23:], y[23:]), shuffle=False, verbose=0
)
results = {"history": history.history, "weights": model.get_weights(), "predict": model.predict(x, verbose=0)}
