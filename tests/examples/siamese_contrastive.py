"""After keras.io's "Image similarity estimation using a Siamese Network with a contrastive loss".

Pairs, a loss with a margin.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers, ops

keras.utils.set_random_seed(16)


def contrastive(margin=1):
    def loss(y_true, y_pred):
        near, far = ops.square(y_pred), ops.square(ops.maximum(margin - y_pred, 0))
        return ops.mean((1 - y_true) * near + y_true * far)

    return loss


numbers = np.random.default_rng(16)
left, right = (numbers.normal(size=(30, 6, 6, 1)).astype("float32") for _ in range(2))
other = numbers.integers(2, size=30).astype("float32")
inputs = keras.Input((6, 6, 1))
h = layers.BatchNormalization()(inputs)
h = layers.Conv2D(4, 3, activation="tanh")(h)
h = layers.BatchNormalization()(layers.Flatten()(layers.AveragePooling2D(2)(h)))
tower = keras.Model(inputs, layers.Dense(6, activation="tanh")(h))
a, b = keras.Input((6, 6, 1)), keras.Input((6, 6, 1))
apart = layers.Lambda(
    lambda two: ops.sqrt(ops.maximum(ops.sum(ops.square(two[0] - two[1]), 1, keepdims=True), 1e-7))
)([tower(a), tower(b)])
model = keras.Model([a, b], layers.Dense(1, activation="sigmoid")(layers.BatchNormalization()(apart)))
optimizer = tf_dist.distribute(keras.optimizers.RMSprop(0.003, epsilon=1e-3), comm)
model.compile(optimizer, loss=contrastive(), metrics=["accuracy"])
history = model.fit(
    [left[:24], right[:24]],
    other[:24],
    validation_data=([left[24:], right[24:]], other[24:]),
    batch_size=12,
    epochs=2,
    shuffle=False,
    verbose=0,
)
results = {
    "history": history.history,
    "weights": model.get_weights(),
    "evaluate": model.evaluate([left, right], other, verbose=0),
}
