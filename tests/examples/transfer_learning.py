"""After keras.io's "Transfer learning & fine-tuning".

A frozen base with BatchNormalization, then all of it at a small rate.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(27)
numbers = np.random.default_rng(27)
x, y = (
    numbers.normal(size=(27, 6, 6, 3)).astype("float32"),
    numbers.integers(2, size=(27, 1)).astype("float32"),
)
picture = keras.Input((6, 6, 3))
h = layers.BatchNormalization()(layers.Conv2D(4, 3, activation="tanh")(picture))
base = keras.Model(picture, layers.BatchNormalization()(layers.SeparableConv2D(4, 3)(h)))
base.trainable = False
inputs = keras.Input((6, 6, 3))
h = layers.Rescaling(0.5)(inputs)
h = layers.GlobalAveragePooling2D()(base(h, training=False))
model = keras.Model(inputs, layers.Dense(1)(h))
found = {}
for stage, rate in (("frozen", 0.05), ("fine", 0.005)):
    base.trainable = stage == "fine"
    model.compile(
        tf_dist.distribute(keras.optimizers.Adam(rate, epsilon=1e-3), comm),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy()],
    )
    found[stage] = model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0).history
results = found | {"weights": model.get_weights(), "predict": model.predict(x, verbose=0)}
