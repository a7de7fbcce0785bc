"""A training loop of your own: the distributed optimizer takes the mean of the gradients over all ranks.

mpirun -np 2 python docs/examples/custom_loop.py
"""

import tf_dist

comm = tf_dist.connect()  # before keras is imported

import keras
import numpy as np
import tensorflow as tf

keras.utils.set_random_seed(1)
rng = np.random.default_rng(1)
x = rng.normal(size=(1000, 8)).astype("float32")
y = (x @ rng.normal(size=(8, 1))).astype("float32")

model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
optimizer = tf_dist.distribute(keras.optimizers.SGD(0.1), comm)
optimizer.build(model.trainable_variables)  # here all ranks take over the weights of rank 0


@tf.function
def step(x_BxF, y_Bx1, weights_B):
    with tf.GradientTape() as tape:
        errors = keras.ops.mean((model(x_BxF, training=True) - y_Bx1) ** 2, axis=-1)
        # With these weights the mean over ranks is the mean over rows, also where rows do not divide.
        loss = keras.ops.mean(errors * weights_B)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply(gradients, model.trainable_variables)
    return loss


for _ in range(3):
    for x_BxF, y_Bx1, weights_B in tf_dist.shard((x, y), comm, batch_size=32):  # my rows of each batch
        loss = step(x_BxF, y_Bx1, weights_B)
optimizer.finalize_variable_values(model.trainable_variables)  # all ranks have taken as many steps

if comm.rank == 0:
    print(f"own loop on {comm.size} ranks: loss {float(loss):.2e}")
