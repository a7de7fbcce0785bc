"""Train on every rank, and leave files that plain Keras opens, without tf_dist and MPI.

    mpirun -np 2 python docs/examples/plain_keras_export.py

Afterwards, anywhere:

    import keras
    model = keras.saving.load_model("model.keras")
    model.predict(...)

The models of `tf-dist train` have layers of our own; `tf-dist checkpoint convert runs/latest model.keras`
writes them with Keras's.
"""

import tf_dist

comm = tf_dist.connect()  # before keras is imported

import keras
import numpy as np

keras.utils.set_random_seed(1)
text = np.frombuffer(b"the cat sat on the mat. " * 200, np.uint8)
inputs = keras.Input((16,), dtype="int32")
x = keras.layers.Embedding(256, 32)(inputs)
model = keras.Model(inputs, keras.layers.Dense(256)(keras.layers.LSTM(32, return_sequences=True)(x)))

trainer = tf_dist.Trainer(model, keras.optimizers.Adam(1e-2), comm, global_batch_size=8, clip_norm=1.0)
trainer.fit(text, steps=60)

if comm.rank == 0:  # every rank holds the same weights: one of them saves
    model.save("model.keras")
    model.save_weights("model.weights.h5")
    after_the = model.predict(text[None, :16].astype("int32"), verbose=0)[0, 2]
    print(f"after 'the' comes {chr(after_the.argmax())!r}")
