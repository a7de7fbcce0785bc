"""After keras.io's "Timeseries forecasting for weather prediction".

Windows by Keras's own utility, checkpoints, early stopping.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(13)
hours = np.arange(120)
series = np.stack([np.sin(hours / 5), np.cos(hours / 7), hours / 120], axis=1).astype("float32")


def windows(part):
    return keras.utils.timeseries_dataset_from_array(
        part[:-6], part[11:, 0], sequence_length=6, sampling_rate=1, batch_size=9, shuffle=False
    )


train, validation = windows(series[:80]), windows(series[80:])
model = keras.Sequential([keras.Input((6, 3)), layers.LSTM(6), layers.Dense(1)])
model.compile(tf_dist.distribute(keras.optimizers.Adam(0.01, epsilon=1e-3), comm), loss="mse")
history = model.fit(
    train,
    epochs=3,
    validation_data=validation,
    verbose=0,
    callbacks=[
        keras.callbacks.EarlyStopping("val_loss", min_delta=0, patience=1),
        keras.callbacks.ModelCheckpoint(
            "best.weights.h5", monitor="val_loss", save_weights_only=True, save_best_only=True
        ),
    ],
)
model.load_weights("best.weights.h5")
results = {
    "history": history.history,
    "best": model.get_weights(),
    "predict": model.predict(validation, verbose=0),
}
