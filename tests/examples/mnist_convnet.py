"""After keras.io's "Simple MNIST convnet": two convolutions, one-hot targets, a validation split."""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(1)
numbers = np.random.default_rng(1)
labels = numbers.integers(4, size=44)
images = numbers.normal(0.1, 0.3, size=(44, 8, 8, 1)) + labels[:, None, None, None] / 4
images, targets = images.astype("float32"), keras.utils.to_categorical(labels, 4)

model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        layers.Conv2D(4, 3, activation="tanh"),
        layers.MaxPooling2D(2),
        layers.Conv2D(6, 3, activation="tanh", padding="same"),
        layers.Flatten(),
        layers.Dense(4, activation="softmax"),
    ]
)
optimizer = tf_dist.distribute(keras.optimizers.Adam(0.01, epsilon=1e-4), comm)
model.compile(optimizer, loss="categorical_crossentropy", metrics=["accuracy"])
history = model.fit(images, targets, batch_size=10, epochs=2, validation_split=0.2, shuffle=False, verbose=0)
results = {
    "history": history.history,
    "weights": model.get_weights(),
    "evaluate": model.evaluate(images, targets, verbose=0),
}
