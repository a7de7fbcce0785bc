"""What a Trainer settles before its first step: ranks that mean something else are told what differs."""

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError

pytestmark = pytest.mark.ranks(2)

V, T = 13, 6
TOKENS = (np.arange(900) ** 2 % V).astype(np.uint16)
N = MPI.COMM_WORLD.size
SIZES = {
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "seq_len": T,
    "autotune": "off",
    "check_every": 1,
    "clip_norm": 0.0,
}
# Of ranks that differ, all of them at least: with one there is nothing to compare.
several = pytest.mark.skipif(N == 1, reason="one rank agrees with itself")


def branches(order, activation="tanh", scale=1.0, policy=None, dims=5):
    """A subclassed model, whose weights stand in the order in which its layers are named."""
    import keras
    from keras import layers

    class Branches(keras.Model):
        def __init__(self):
            super().__init__(dtype=policy)
            self.table = layers.Embedding(V, dims, dtype=policy)
            self.branch = {name: layers.Dense(dims, activation, name=name, dtype=policy) for name in order}
            self.logits = layers.Dense(V, dtype=policy)

        def call(self, tokens, training=False):
            x = self.table(tokens)
            return self.logits(scale * self.branch["a"](x) * x - self.branch["b"](x))

    return Branches()


def trainer(comm, model=None, optimizer=None, update="allreduce", **more):
    import keras

    from tf_dist.training.trainer import Trainer

    return Trainer(
        model or branches("ab"), optimizer or keras.optimizers.Adam(1e-2), comm, update, **SIZES | more
    )


def refused(everyone, train):
    """The words with which all ranks are refused."""
    try:
        train()
        said = "nothing"
    except LaunchError as error:
        said = str(error)
    assert len(set(everyone(said))) == 1
    return said


def adam(rank, **more):
    import keras

    return keras.optimizers.Adam(**{name: value + 0.01 * rank for name, value in more.items()})


def schedule(rank):
    import keras

    return keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 100 + rank))


def model_case(rank, **of_rank_1):
    return {"model": branches(**{"order": "ab", **(of_rank_1 if rank else {})})}


# Arguments of a Trainer by rank, 0 or 1, and what is said of them.
CASES = {
    "order": (
        lambda r: model_case(r, order="ba"),
        "weight 1: branches/a/kernel .* rank 0, branches/b/kernel",
    ),
    "shapes": (lambda r: model_case(r, dims=6), r"weight 0: .*\(13, 5\).*\(13, 6\)"),
    "activation": (lambda r: model_case(r, activation="relu"), "activation: tanh on rank 0, relu"),
    "policy": (lambda r: model_case(r, policy="mixed_bfloat16"), "policy: float32 on rank 0, mixed_b"),
    "rate": (lambda r: {"optimizer": adam(r, learning_rate=0.1)}, "learning_rate: 0.1.* on rank 0"),
    "beta": (lambda r: {"optimizer": adam(r, beta_1=0.9)}, "beta_1: 0.9 on rank 0"),
    "schedule": (lambda r: {"optimizer": schedule(r)}, "decay_steps: 100 on rank 0, 101 on"),
    "update": (lambda r: {"update": "master" if r else "allreduce"}, "strategy: allreduce on rank 0, master"),
    "batch": (lambda r: {"global_batch_size": 8 + 8 * r}, "global_batch_size: 8 on rank 0, 16"),
    "seed": (lambda r: {"seed": 1 + r}, "seed: 1 on rank 0, 2 on"),
    "clip": (lambda r: {"clip_norm": 0.1 * r}, "clip_norm: 0.0 on rank 0, 0.1"),
    "local": (
        lambda r: {"update": "diloco", "local": {"sync_every": 2 + r}},
        "local.sync_every: 2 on rank 0",
    ),
}


@several
@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_named(connected, everyone, case):
    import re

    make, words = CASES[case]
    said = refused(everyone, lambda: trainer(connected, **make(min(connected.rank, 1))))
    assert re.search(words, said), said
    assert said.startswith("the ranks do not agree on the ")


VALIDATED = {"steps": 2, "eval_every": 1}
FITS = {
    "steps": (lambda fit, r: fit(TOKENS, steps=4 + r), "steps: 4 on rank 0, 5 on"),
    "validation": (lambda fit, r: fit(TOKENS, validation=TOKENS[r:99], **VALIDATED), "validation: 99 .* 98 "),
    "eval_every": (lambda fit, r: fit(TOKENS, steps=4, eval_every=2 + r), "eval_every: 2 on rank 0, 3 on"),
    "tokens": (lambda fit, r: fit((TOKENS + r) % V, steps=2), "the data:\n  tokens: 900 .* on rank 0, 900 "),
    "length": (lambda fit, r: fit(TOKENS[: 900 - r], steps=2), "tokens: 900 .* on rank 0, 899 "),
}


@several
@pytest.mark.parametrize("case", FITS)
def test_what_fit_is_given_differs(connected, everyone, case):
    import re

    train, words = FITS[case]
    said = refused(everyone, lambda: train(trainer(connected).fit, min(connected.rank, 1)))
    assert re.search(words, said, re.DOTALL), said


SEEN = "from the same weights and the same rows the ranks compute something else"


@several
def test_code_that_computes_something_else_is_seen_in_its_gradients(connected, everyone):
    model = branches("ab", scale=1.0 + min(connected.rank, 1))  # no option says so, but this number does
    model._built_by_hand, SEEN = (
        True,
        "from the same weights and the same rows the ranks compute something else",
    )
    trained = trainer(connected, model)
    assert SEEN in refused(everyone, lambda: trained.fit(TOKENS, steps=1))
    own = trainer(connected, branches("ab", scale=1.0 + min(connected.rank, 1)))
    sequences = own.sequences(TOKENS)  # a loop of one's own is looked at as well
    assert SEEN in refused(everyone, lambda: own.train_step(sequences, own.sampler(sequences)))


def untrained(kind):
    import keras
    from keras import layers

    tokens = keras.Input((T,), dtype="int32")
    dense = layers.Dense(8)
    x = dense(layers.Embedding(V, 8)(tokens))
    if kind == "frozen":
        dense.trainable = False
    elif kind == "lora":
        dense.enable_lora(2)
    elif kind == "batch norm":
        x = layers.BatchNormalization()(x)
    return keras.Model(tokens, layers.Dense(V)(x))


@pytest.mark.parametrize(
    ("kind", "update"),
    [("frozen", "allreduce"), ("lora", "zero"), ("schedule-free", "allreduce"), ("ema", "local-sgd")],
)
def test_everybody_begins_with_all_of_rank_0(connected, everyone, kind, update):
    """Also what is not trained, and what optimizers make of weights; models are built without a seed."""
    import keras

    keras.utils.set_random_seed(10 + connected.rank)
    optimizer = {
        "schedule-free": lambda: keras.optimizers.ScheduleFreeAdamW(1e-2),
        "ema": lambda: keras.optimizers.SGD(1e-2, use_ema=True, ema_overwrite_frequency=2),
    }.get(kind, lambda: keras.optimizers.Adam(1e-2))()
    model = untrained(kind)
    before = everyone([np.asarray(v.value) for v in model.weights])[0]
    trained = trainer(connected, model, optimizer, update)
    for v, wanted in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(np.asarray(v.value), wanted)
    trained.fit(TOKENS, steps=3)
    weights = everyone([np.asarray(v.value).tobytes() for v in model.weights])
    assert all(one == weights[0] for one in weights)


@pytest.mark.parametrize("update", ["allreduce", "zero"])
def test_moving_averages_are_those_of_all_ranks(connected, everyone, update):
    """Bit for bit those of one rank."""
    import keras

    found = []
    for comm in (connected, SerialComm()):
        keras.utils.set_random_seed(5)
        model = untrained("batch norm")
        trained = trainer(comm, model, None, update if comm.size > 1 else "allreduce")
        trained.fit(TOKENS, steps=3, validation=TOKENS[:50], eval_every=3)
        found.append([np.asarray(v.value) for v in model.weights])
    assert all(everyone(all(np.array_equal(a, b) for a, b in zip(*found, strict=True))))


def test_rank_0_alone_has_built_the_model_and_the_optimizer(connected, everyone):
    """The others have made other layers before, so that Keras numbers theirs otherwise."""
    import keras

    keras.utils.set_random_seed(10 + connected.rank)
    optimizer = keras.optimizers.Adam(1e-2)
    if connected.rank == 0:
        model = branches("ab")
        model(np.zeros((1, T), np.int32))
        optimizer.build(model.trainable_variables)
        optimizer.iterations.assign(7)
    else:
        keras.Sequential([keras.layers.Embedding(3, 3), keras.layers.Dense(2), keras.layers.Dense(2)])
        model = branches("ab")
    trained = trainer(connected, model, optimizer)
    trained.fit(TOKENS, steps=2)
    assert everyone(int(optimizer.iterations.numpy())) == [9] * N
    weights = everyone([np.asarray(v.value).tobytes() for v in model.weights])
    assert all(one == weights[0] for one in weights)


def test_raw_communicators_and_two_trainings_side_by_side(connected, everyone):
    whole = trainer(MPI.COMM_WORLD)
    assert whole.comm.size == N
    half = MPI.COMM_WORLD.Split(connected.rank % 2)
    trained = trainer(half, seed=1 + connected.rank % 2)
    trained.fit(TOKENS, steps=2 + connected.rank % 2)
    found = everyone((trained.comm.size, trained.step, trained.check_equal()))
    assert [step for _, step, _ in found] == [2 + rank % 2 for rank in range(N)]
    for parity in (0, 1):
        mine = found[parity::2]
        assert len({sha for _, _, sha in mine}) <= 1 and all(size == len(mine) for size, _, _ in mine)
