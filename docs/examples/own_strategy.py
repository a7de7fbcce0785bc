"""A strategy of your own: signSGD with majority vote (Bernstein et al. 2019), by `Trainer` or by a flag.

mpirun -np 2 python docs/examples/own_strategy.py
cd docs/examples && mpirun -np 2 tf-dist train --strategy own_strategy:SignVote --steps 200
"""

import numpy as np

import tf_dist
from tf_dist.parallel.totals import own_sum, scale_of
from tf_dist.strategies import Strategy


class SignVote(Strategy):
    """Ranks vote on the sign of each element of the gradient, and all step by what most of them say."""

    def step(self, request):
        gradient_P = own_sum(request.gradients(), request.replica.parameters)  # of this rank's rows
        counts = request.totals.reduce(request.mesh.all)  # losses and tokens of all ranks
        votes_P = np.sign(gradient_P)
        request.mesh.all.allreduce(votes_P)
        norm = request.replica.norm(votes_P)
        scale_of(norm, counts, 0.0)  # a gradient that is not finite ends the step on all ranks alike
        request.replica.apply(np.sign(votes_P), 1.0)  # one step of the Keras optimizer
        return norm

    def describe(self):
        return "by the signs of the majority"


if __name__ == "__main__":
    comm = tf_dist.connect()  # before keras is imported

    import keras

    keras.utils.set_random_seed(1)
    text = np.frombuffer(b"the cat sat on the mat. " * 200, np.uint8)
    inputs = keras.Input((16,), dtype="int32")
    x = keras.layers.Embedding(256, 32)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(256)(keras.layers.GRU(32, return_sequences=True)(x)))

    trainer = tf_dist.Trainer(model, keras.optimizers.SGD(3e-3), comm, SignVote(), global_batch_size=8)
    history = trainer.fit(text[:-500], steps=200, validation=text[-500:], eval_every=100)
    if comm.rank == 0:
        print(f"signs of {comm.size} ranks: validation loss {history['val_loss'][-1]:.4f}")
