"""Elastic averaging and gossip over real ranks: they learn, meet, save and go on."""

import time

import numpy as np
import pytest
from mpi4py import MPI
from test_training_mpi import HELD_OUT, TOKENS, flat, steps_of, trainer

from tf_dist.errors import LaunchError

N = MPI.COMM_WORLD.size
# One rank alone: tests/strategies/test_asynchronous.py.
pytestmark = pytest.mark.ranks(3)
WAYS = {
    "easgd": ("easgd", {"asynchrony": {"master_trains": "off"}}),
    "easgd, the master trains": (
        "easgd",
        {"asynchrony": {"master_trains": "on"}, "local": {"sync_every": 2}},
    ),
    "gossip": ("gossip", {}),
}


def made(comm, way, **more):
    update, options = WAYS[way]
    return trainer(comm, update, **options, **more)


def steps_together(trained, count):
    """Steps at the end of which all meet; the tokens of all ranks."""
    trained.last_step = trained.step + count
    steps_of(trained, count)
    trained.synchronize()
    return trained.tokens


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.extended)])
@pytest.mark.parametrize("way", WAYS)
def test_it_learns_and_all_end_alike(connected, everyone, way, slow):
    trained = made(connected, way)
    if slow and connected.rank == N - 1:
        gradients = trained.replica.gradients
        trained.replica.gradients = lambda *given: (time.sleep(0.005), gradients(*given))[1]
    before = trained.validate(HELD_OUT)["val_loss"]
    history = trained.fit(TOKENS[:200] % 5, steps=60, validation=TOKENS[200:260] % 5, eval_every=30)
    assert history["val_loss"][-1] < before - 0.5
    assert everyone(history) == [everyone(history)[0]] * N
    assert len(set(everyone((flat(trained.model).tobytes(), trained.step, trained.tokens)))) == 1


@pytest.mark.parametrize("way", WAYS)
def test_every_token_is_counted_once(connected, everyone, way):
    trained = made(connected, way)
    tokens = steps_together(trained, 5)
    from tf_dist.comm.transport.base import SerialComm

    alone = trainer(SerialComm())
    steps_of(alone, 5)
    assert everyone(tokens) == [alone.tokens] * N


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_from_a_checkpoint(connected, one_folder, everyone, way):
    from tf_dist.training import state_dict

    first = made(connected, way)
    steps_together(first, 4)
    state_dict.save(first, one_folder, 1, {})
    second = made(connected, way, seed=2)
    state_dict.restore(second, one_folder / "step-00000004")
    assert all(everyone(bool((flat(first.model) == flat(second.model)).all())))
    assert int(second.optimizer.iterations) == second.step == 4
    assert steps_together(second, 3) == steps_together(first, 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_differs_after_all_have_met_is_named(connected, way):
    trained = made(connected, way, check_every=2)
    steps_together(trained, 2)
    if connected.rank == N - 1:
        weight = trained.model.weights[0]
        weight.assign(weight + np.float32(1e-3))
    with pytest.raises(LaunchError, match=f"rank {N - 1}"):
        steps_of(trained, 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_wish_to_stop_counts_when_all_meet(connected, everyone, way):
    trained = made(connected, way)
    import keras

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if connected.rank == N - 1:
                trained.request_stop()

    trained.fit(TOKENS, steps=40, validation=HELD_OUT, eval_every=8, callbacks=[Stop()])
    assert everyone(trained.step) == [8] * N
