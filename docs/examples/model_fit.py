"""Keras's `model.fit` on every rank: two lines are new, and the result is that of one process.

mpirun -np 2 python docs/examples/model_fit.py
"""

import tf_dist

comm = tf_dist.connect()  # before keras is imported

import keras
import numpy as np

keras.utils.set_random_seed(1)
rng = np.random.default_rng(1)
x = rng.normal(size=(1000, 8)).astype("float32")
y = (x @ rng.normal(size=(8, 1))).astype("float32")  # a line, so that a loss near 0 can be reached

model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "gelu"), keras.layers.Dense(1)])
model.compile(tf_dist.distribute(keras.optimizers.Adam(1e-2), comm), loss="mse")
# 32 rows are those of all ranks together.
history = model.fit(x, y, batch_size=32, epochs=5, validation_split=0.1, verbose=0)

if comm.rank == 0:  # logs are those of all ranks, and the same on each
    print(f"model.fit on {comm.size} ranks: validation loss {history.history['val_loss'][-1]:.4f}")
