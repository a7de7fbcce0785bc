"""A callback of your own: it is called on every rank, with the same logs, and writes on one.

mpirun -np 2 python docs/examples/own_callback.py
"""

import tf_dist

comm = tf_dist.connect()  # before keras is imported

import keras
import numpy as np


class StopWhenGoodEnough(keras.callbacks.Callback):
    """Ends training below a validation loss; the logs are those of all ranks, so all decide alike."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def on_epoch_end(self, epoch, logs=None):
        if comm.rank == 0:  # one file, not one for each rank
            with open("losses.txt", "a") as file:
                file.write(f"{epoch} {logs['val_loss']:.4f}\n")
        if logs["val_loss"] < self.loss:
            self.model.stop_training = True  # on any rank: all agree to stop after this step


keras.utils.set_random_seed(1)
text = np.frombuffer(b"the cat sat on the mat. " * 200, np.uint8)
inputs = keras.Input((16,), dtype="int32")
x = keras.layers.Embedding(256, 32)(inputs)
model = keras.Model(inputs, keras.layers.Dense(256)(keras.layers.GRU(32, return_sequences=True)(x)))

trainer = tf_dist.Trainer(model, keras.optimizers.Adam(1e-2), comm, global_batch_size=8)
history = trainer.fit(
    text[:-500], steps=200, validation=text[-500:], eval_every=20, callbacks=[StopWhenGoodEnough(1.0)]
)
if comm.rank == 0:
    print(f"stopped at step {trainer.step} of 200: validation loss {history['val_loss'][-1]:.4f}")
