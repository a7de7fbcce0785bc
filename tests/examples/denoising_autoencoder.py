"""After keras.io's "Convolutional autoencoder for image denoising".

Images are their own targets, then noisy ones; two calls of fit.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(22)
numbers = np.random.default_rng(22)
images = numbers.random((30, 8, 8, 1)).astype("float32")
noisy = np.clip(images + 0.4 * numbers.normal(size=images.shape), 0, 1).astype("float32")
model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        layers.Conv2D(4, 3, activation="tanh", padding="same"),
        layers.MaxPooling2D(2, padding="same"),
        layers.Conv2DTranspose(4, 3, strides=2, activation="tanh", padding="same"),
        layers.Conv2D(1, 3, activation="sigmoid", padding="same"),
    ]
)
model.compile(
    tf_dist.distribute(keras.optimizers.Adam(0.003, epsilon=1e-3), comm), loss="binary_crossentropy"
)
first = model.fit(
    images[:22],
    images[:22],
    epochs=1,
    batch_size=9,
    shuffle=False,
    validation_data=(images[22:], images[22:]),
    verbose=0,
)
second = model.fit(
    noisy[:22],
    images[:22],
    epochs=1,
    batch_size=9,
    shuffle=False,
    validation_data=(noisy[22:], images[22:]),
    verbose=0,
)
results = {
    "first": first.history,
    "second": second.history,
    "weights": model.get_weights(),
    "predict": model.predict(noisy, verbose=0),
}
