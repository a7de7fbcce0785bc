"""After keras.io's "Structured data classification with FeatureSpace".

A table of numbers and words, preprocessed in tf.data.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from keras import layers
from keras.utils import FeatureSpace

keras.utils.set_random_seed(15)
numbers = np.random.default_rng(15)
frame = pd.DataFrame(
    {
        "age": numbers.integers(20, 80, size=42),
        "pressure": numbers.normal(120, 15, size=42),
        "thal": numbers.choice(["fixed", "normal", "reversible"], size=42),
        "target": numbers.integers(2, size=42),
    }
)


def batches(part):
    columns = {
        name: part[name].to_numpy(object if name == "thal" else None) for name in ("age", "pressure", "thal")
    }
    return tf.data.Dataset.from_tensor_slices((columns, part["target"].to_numpy())).batch(8)


train, validation = batches(frame[:30]), batches(frame[30:])
space = FeatureSpace(
    features={
        "age": FeatureSpace.float_discretized(num_bins=4),
        "pressure": FeatureSpace.float_normalized(),
        "thal": FeatureSpace.string_categorical(num_oov_indices=0),
    },
    output_mode="concat",
)
space.adapt(train.map(lambda x, _: x))
inputs = space.get_encoded_features()
h = layers.Dense(8, activation="tanh")(inputs)
model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(h))
optimizer = tf_dist.distribute(keras.optimizers.Adam(0.01, epsilon=1e-3), comm)
model.compile(optimizer, loss="binary_crossentropy", metrics=["accuracy"])
ready, held_out = (one.map(lambda x, y: (space(x), y)).prefetch(2) for one in (train, validation))
history = model.fit(ready, epochs=2, validation_data=held_out, verbose=0)
whole = keras.Model(space.get_inputs(), model(space.get_encoded_features()))
results = {
    "history": history.history,
    "weights": model.get_weights(),
    "predict": whole.predict(validation.map(lambda x, _: x), verbose=0),
}
