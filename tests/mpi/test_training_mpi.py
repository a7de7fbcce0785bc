"""The trainer over real ranks, against the same training on one: the law, inside one launch.

Models are small and plain, to be traced quickly; those of the project are in tests/jobs/test_equivalence.py.
Keras is imported inside functions: ``connected`` comes first, as in a user's script.
"""

import os
import re

import numpy as np
import pytest

from tf_dist import faults
from tf_dist.comm.runtime import launch, thread_budget
from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError, NumericError

pytestmark = pytest.mark.ranks(1, 3)

V, T, G, B = 29, 8, 12, 3  # vocabulary, tokens, global rows, rows of a micro-batch: 4 micro-batches
STEPS = 12
TOKENS = np.random.default_rng(1).integers(0, V, 1500).astype(np.uint16)
HELD_OUT = np.random.default_rng(2).integers(0, V, 333).astype(np.uint16)


def build(seed=1, dropout=0.2, policy="float32"):
    import keras
    from keras import layers

    keras.utils.set_random_seed(seed)
    tokens = keras.Input((T,), dtype="int32")
    x = layers.Dropout(dropout, dtype=policy)(layers.Embedding(V, 8, dtype=policy)(tokens))
    x = layers.Dense(16, activation="relu", dtype=policy)(x)
    x = layers.Dropout(dropout, dtype=policy)(x)
    return keras.Model(tokens, layers.Dense(V, dtype=policy)(x))


def trainer(comm, update="allreduce", *, rows=B, seed=1, rate=1e-2, policy="float32", **more):
    import keras

    from tf_dist.training.trainer import Trainer

    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01)
    return Trainer(
        build(seed, policy=policy), optimizer, comm, update,
        global_batch_size=G, micro_batch_size=rows, seq_len=T, clip_norm=1.0, seed=3, **more,
    )  # fmt: skip


def flat(model):
    return np.concatenate([np.asarray(variable.value).ravel() for variable in model.weights])


def steps_of(trained, count=STEPS):
    """Take steps; the logs of each."""
    sequences = trained.sequences(TOKENS)
    sampler = trained.sampler(sequences)
    return [trained.train_step(sequences, sampler) for _ in range(count)]


def refused_everywhere(trained, everyone):
    """The words with which a step is refused, the same on all ranks; "nothing" where it is not."""
    try:
        steps_of(trained, 1)
        outcome = "nothing"
    except (LaunchError, NumericError) as error:
        outcome = str(error)
    assert everyone(outcome) == [everyone(outcome)[0]] * trained.comm.size
    return outcome


@pytest.fixture(scope="module")
def serial(connected):
    """The training on one rank, done by each rank for itself: what all others must equal."""
    alone = trainer(SerialComm())
    logs = steps_of(alone)
    return alone, logs, flat(alone.model), alone.validate(HELD_OUT, 100)


@pytest.mark.parametrize("update", ["allreduce", "master"])
def test_parallel_is_serial(connected, carried, serial, everyone, update):
    _, logs_serial, weights_serial, result_serial = serial
    parallel = trainer(carried, update)
    logs = steps_of(parallel)
    weights = flat(parallel.model)
    assert len(set(everyone(weights.tobytes()))) == 1, "the ranks have different weights"
    by_mpi = carried is connected  # Horovod adds in an order of its own
    assert max(everyone(float(np.abs(weights - weights_serial).max()))) <= (0.0 if by_mpi else 1e-5)
    assert everyone(logs) == [everyone(logs)[0]] * carried.size, "the ranks were told different things"
    for mine, theirs in zip(logs, logs_serial, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine == theirs or not by_mpi
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-5)
    assert parallel.tokens == sum(log["tokens"] for log in logs)
    result = parallel.validate(HELD_OUT, 100)
    assert result == result_serial if by_mpi else result == pytest.approx(result_serial, rel=1e-5)
    assert set(result) == {"val_loss", "val_accuracy", "perplexity", "bits_per_byte"}


@pytest.mark.ranks(2)
def test_parallel_is_serial_with_xla(connected, everyone):
    """Other bits than without it, and the same on any number of ranks."""
    weights = []
    for comm in (connected, SerialComm()):
        trained = trainer(comm, xla="on")
        trained.fit(TOKENS, steps=4)
        weights.append(flat(trained.model))
    assert all(everyone(bool((weights[0] == weights[1]).all())))


@pytest.mark.ranks(2)
def test_parallel_is_serial_in_bfloat16(connected, everyone):
    """Gradients leave the model as float32 and are summed as such: the order, and the bits, are the same."""
    alone, parallel = (trainer(comm, policy="mixed_bfloat16") for comm in (SerialComm(), connected))
    logs_alone, logs = steps_of(alone, 6), steps_of(parallel, 6)
    assert everyone(logs) == [logs_alone] * connected.size
    assert everyone(flat(parallel.model).tobytes()) == [flat(alone.model).tobytes()] * connected.size
    assert parallel.validate(HELD_OUT, 100) == alone.validate(HELD_OUT, 100)


def test_the_last_batch_of_an_epoch_is_short(connected, everyone):
    """Padding counts nothing: an epoch has every token but the first as a target, once."""
    parallel = trainer(connected)
    sequences = parallel.sequences(TOKENS)
    steps = parallel.sampler(sequences).steps_per_epoch
    assert len(sequences) % G, "else no batch would be short"
    logs = steps_of(parallel, steps)
    assert sum(log["tokens"] for log in logs) == len(TOKENS) - 1
    assert everyone(parallel.check_equal()) == [parallel.check_equal()] * connected.size


def test_ranks_without_a_micro_batch(connected, serial, everyone):
    """One micro-batch a step: all ranks but the first add zeros, and nobody hangs."""
    parallel = trainer(connected, rows=G)
    mine = list(parallel.my_micro_batches)
    assert everyone(mine) == [[0]] + [[]] * (connected.size - 1)
    logs = steps_of(parallel, 3)
    assert [log["tokens"] for log in logs] == [G * T] * 3
    assert np.isfinite([log["loss"] for log in logs]).all()
    assert len(set(everyone(flat(parallel.model).tobytes()))) == 1
    # The same batches: the first loss differs from that of small micro-batches by its dropout alone.
    assert logs[0]["loss"] == pytest.approx(serial[1][0]["loss"], abs=0.05)


def test_fit_begins_with_the_weights_of_rank_0(connected, everyone):
    different = trainer(connected, seed=1 + connected.rank)
    own = flat(build(1 + connected.rank))
    assert len(set(everyone(own.tobytes()))) == connected.size
    first = everyone(own)[0]
    assert all(everyone(bool((flat(different.model) == first).all())))
    different.model.set_weights([np.full(v.shape, connected.rank + 1.0) for v in different.model.weights])
    first = everyone(flat(different.model))[0]
    different.broadcast_weights()
    assert all(everyone(bool((flat(different.model) == first).all())))
    different.fit(TOKENS, steps=2)
    assert len(set(everyone(flat(different.model).tobytes()))) == 1


def test_callbacks_hear_the_same_and_one_rank_can_stop_all(connected, everyone):
    import keras

    heard = []

    class Listener(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            heard.append((batch, logs["loss"], logs["tokens"]))
            # The last rank alone wants to stop, as if a signal had reached it.
            if trained.step == 5 and connected.rank == connected.size - 1:
                trained.request_stop()

        def on_epoch_end(self, epoch, logs=None):
            heard.append((epoch, sorted(logs.items())))

    trained = trainer(connected)
    trained.fit(TOKENS, steps=50, validation=HELD_OUT, eval_every=3, callbacks=[Listener()])
    assert everyone(heard) == [everyone(heard)[0]] * connected.size
    # The wish travels with the next reduction.
    assert everyone((trained.step, trained.stopped)) == [(6, True)] * connected.size


def test_a_replica_that_drifts_is_named(connected, everyone):
    trained = trainer(connected)
    steps_of(trained, 1)
    trained.check_equal()
    last = connected.size - 1
    if connected.rank == last:
        bias = trained.model.weights[-1]
        bias.assign(bias + np.float32(1e-6))
    try:
        trained.check_equal()
        outcome = "equal"
    except LaunchError as error:
        outcome = str(error)
    assert everyone(outcome) == [outcome] * connected.size
    if connected.size == 1:
        assert outcome == "equal"
        return
    others = ", ".join(map(str, range(last)))
    who = "rank 0 and rank 1 differ" if last == 1 else f"rank {last} differs from ranks {others}"
    path = everyone(trained.model.weights[-1].path)[0]  # Keras numbers layers in each process by itself
    assert f"before step 2 the ranks no longer hold the same model: {who} in {path}" in outcome


@pytest.mark.parametrize("update", ["allreduce", "master"])
def test_not_a_number_on_one_rank_stops_all(connected, everyone, update):
    """Every rank raises the same, at the same step, and no weight has changed."""
    trained = trainer(connected, update, max_bad_steps=0)
    before = flat(trained.model)
    gradients = trained.replica.gradients

    def poisoned(*arguments):
        gradient, sums = gradients(*arguments)
        if connected.rank == connected.size - 1:
            gradient = np.full_like(gradient, np.nan)
        return gradient, sums

    trained.replica.gradients = poisoned
    said = refused_everywhere(trained, everyone)
    # Keras numbers layers in each process as they are made.
    found = re.search(rf"on rank {connected.size - 1}, first in embedding(_\d+)?/embeddings", said)
    assert "not finite" in said and found
    assert all(everyone(bool((flat(trained.model) == before).all())))


@pytest.fixture(scope="module")
def serial_with_bad_steps(connected):
    faults.arm("nan:step=4,times=2", 0)
    alone = trainer(SerialComm())
    steps_of(alone, 7)
    faults.arm("", 0)
    return flat(alone.model)


@pytest.mark.parametrize(
    ("update", "stage"), [("allreduce", 1), ("master", 1), ("zero", 1), ("zero", 2), ("zero", 3)]
)
def test_bad_steps_are_skipped_alike_on_any_number_of_ranks(
    connected, everyone, serial_with_bad_steps, told, update, stage
):
    """NaN in the gradients of the last rank, in two steps: their batches are used up, and nothing else is."""
    last = connected.size - 1
    faults.arm(f"nan:rank={last},step=4,times=2", connected.rank)
    trained = trainer(connected, update, zero_stage=stage)
    logs = steps_of(trained, 7)
    lines = told.messages
    faults.arm("", 0)
    assert (
        everyone([log["grad_norm"] for log in logs if np.isfinite(log["grad_norm"])])
        == [[log["grad_norm"] for log in logs[:3] + logs[5:]]] * connected.size
    )
    assert everyone(lines) == [lines] * connected.size
    assert [line.split(" was")[0] for line in lines] == ["step 4", "step 5"]
    assert all("first in " in line for line in lines)
    assert stage > 1 or all(f"on rank {last}, first in " in line for line in lines)
    assert (trained.step, trained.state.skipped.total, int(trained.optimizer.iterations.numpy())) == (7, 2, 5)
    sha = trained.check_equal()
    if stage < 3:
        assert all(everyone(bool((flat(trained.model) == serial_with_bad_steps).all())))
    assert len(set(everyone(sha))) == 1


@pytest.mark.ranks(2)
def test_checkpoint_of_all_ranks(connected, everyone, tmp_path_factory):
    """Saved by rank 0, restored everywhere, the training goes on as if it had not stopped."""
    from tf_dist.training import state_dict

    folder = tmp_path_factory.mktemp("checkpoints")
    folder = type(folder)(everyone(str(folder))[0])
    whole = trainer(connected, "master")
    steps_of(whole, 4)
    state_dict.save(whole, folder, 2, {})
    rest = steps_of(whole, 4)
    resumed = trainer(connected, "master", seed=9)
    state_dict.restore(resumed, folder / "step-00000004")
    assert (resumed.step, resumed.tokens) == (4, 4 * G * T)
    assert steps_of(resumed, 4) == rest
    assert len(set(everyone(flat(resumed.model).tobytes()))) == 1
    assert (flat(resumed.model) == flat(whole.model)).all()


# launch.connect ------------------------------------------------------------------------------------


def test_connect(connected, everyone):
    assert everyone((connected.rank, connected.size)) == [
        (r, len(everyone(0))) for r in range(len(everyone(0)))
    ]
    assert isinstance(connected, SerialComm) == (connected.size == 1)
    places = thread_budget.places(connected)
    assert len(places) == connected.size
    assert everyone(repr(places)) == [repr(places)] * connected.size
    assert [place.local_rank for place in places] == list(range(connected.size))
    cores = {core for place in places for core in place.cores}
    assert sum(place.threads for place in places) <= max(len(cores), connected.size)


def test_connect_again_is_the_same_group(connected, everyone):
    """A second call, by a library inside a user's script, does no harm."""
    again = launch.connect(threads_per_rank=int(os.environ.get("TF_NUM_INTRAOP_THREADS", "0")))
    assert (again.rank, again.size) == (connected.rank, connected.size)
    array = np.ones(5)
    again.allreduce(array)
    assert everyone(float(array.sum())) == [5.0 * connected.size] * connected.size
