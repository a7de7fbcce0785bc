"""After keras.io's "Collaborative Filtering for Movie Recommendations".

A subclassed model of regularised embeddings, not built before fit.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import pandas as pd
from keras import layers, ops

keras.utils.set_random_seed(23)


class Recommender(keras.Model):
    def __init__(self, users, movies, size):
        super().__init__()
        small = keras.regularizers.l2(1e-4)
        self.user, self.user_bias = (
            layers.Embedding(users, size, embeddings_regularizer=small),
            layers.Embedding(users, 1),
        )
        self.movie, self.movie_bias = (
            layers.Embedding(movies, size, embeddings_regularizer=small),
            layers.Embedding(movies, 1),
        )

    def call(self, inputs):
        user, movie = inputs[:, 0], inputs[:, 1]
        match = ops.sum(self.user(user) * self.movie(movie), axis=1, keepdims=True)
        return ops.sigmoid(match + self.user_bias(user) + self.movie_bias(movie))


numbers = np.random.default_rng(23)
frame = pd.DataFrame(
    {
        "user": numbers.integers(6, size=45),
        "movie": numbers.integers(9, size=45),
        "rating": numbers.random(45),
    }
)
x, y = frame[["user", "movie"]].values, frame["rating"].values
model = Recommender(6, 9, 4)
optimizer = tf_dist.distribute(keras.optimizers.SGD(0.5, momentum=0.5), comm)
model.compile(optimizer, loss=keras.losses.BinaryCrossentropy())
history = model.fit(
    x=x[:36], y=y[:36], batch_size=8, epochs=2, validation_data=(x[36:], y[36:]), shuffle=False, verbose=0
)
results = {"history": history.history, "weights": model.get_weights(), "predict": model.predict(x, verbose=0)}
