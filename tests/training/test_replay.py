"""Going back to the last state in which ranks were equal, on one rank: what is kept and what done again."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import RankLost
from tf_dist.training.trainer import Trainer

V, T, G = 11, 4, 8
TOKENS = np.random.default_rng(1).integers(0, V, 900).astype(np.uint16)


def trained(steps, on_mismatch="restore", update="allreduce", accident=None, check_every=4):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, 8), layers.Dropout(0.3)])
    model.add(layers.Dense(V))
    trainer = Trainer(
        model, keras.optimizers.Adam(0.01), SerialComm(), update, global_batch_size=G, micro_batch_size=4,
        clip_norm=0.0, seq_len=T, on_mismatch=on_mismatch, check_every=check_every,
    )  # fmt: skip
    sequences = trainer.sequences(TOKENS)
    sampler = trainer.sampler(sequences)
    for step in range(steps):
        if accident and step in accident:
            accident[step](trainer)
        trainer.train_step(sequences, sampler)
    return trainer


def state(trainer):
    arrays = b"".join(np.ascontiguousarray(array).tobytes() for _, array in trainer.whole().tensors())
    return arrays, trainer.step, trainer.tokens


def flip(trainer):
    weight = trainer.model.weights[0]
    array = np.array(np.asarray(weight.value))
    array.reshape(-1).view(np.uint8)[3] ^= 1
    weight.assign(array)


@pytest.mark.parametrize("update", ["allreduce", "master", "zero"])
def test_steps_since_the_last_check_are_taken_again(update):
    calm, hit = trained(11, update=update), trained(11, update=update, accident={9: flip})
    assert state(hit) != state(calm)
    assert hit.replay.take_again(11) == ", and steps 9 to 11 were taken again"  # the last check was after 8
    assert state(hit) == state(calm)
    assert hit.replay.take_again(9) == ", and step 9 was taken again"
    assert hit.step == 9


def test_nothing_was_taken_since_the_last_check():
    calm, hit = trained(4), trained(4)
    for trainer in (calm, hit):
        trainer.consistency_check.compare(4)
    flip(hit)
    assert hit.replay.take_again(4) == ""
    assert state(hit) == state(calm)


def test_a_step_that_was_skipped_is_skipped_again(monkeypatch):
    def inject_nan(trainer):
        gradients = trainer.replica.gradients

        def spoiled(x, y, draw):
            gradient, sums = gradients(x, y, draw)
            return (gradient * np.nan, sums) if draw[0] == 6 else (gradient, sums)

        trainer.replica.gradients = spoiled

    hit = trained(8, accident={0: inject_nan, 7: flip}, check_every=0)
    calm = trained(8, accident={0: inject_nan}, check_every=0)
    assert calm.state.counters[2:] == hit.state.counters[2:] == [1, 0]
    # The bad step made the ranks compare themselves, which nobody had to.
    assert hit.replay.take_again(8) == ", and steps 7 to 8 were taken again"
    assert hit.state.counters[2:] == [1, 0] and state(hit) == state(calm)


@pytest.mark.parametrize(
    "values",
    [{"on_mismatch": "stop"}, {"update": "local-sgd"}],
    ids=["not wanted", "local"],
)
def test_where_nothing_is_kept(values):
    trainer = trained(5, **values)
    before = state(trainer)
    assert trainer.replay.take_again(5) == "" and state(trainer) == before
    trainer.replay.finish()
    assert state(trainer) == before


def test_what_was_kept_does_not_outlive_other_weights():
    trainer = trained(5)
    trainer.broadcast_weights()
    assert trainer.replay.take_again(5) == "" and trainer.step == 5


def test_a_death_meanwhile_begins_again():
    calm, hit = trained(11), trained(11, accident={9: flip})
    train, deaths = hit.runner.forward_backward, [10]

    def dying(step, *more):
        if step in deaths:
            deaths.remove(step)
            raise RankLost("rank 2 has died", [2])
        train(step, *more)

    hit.runner.forward_backward = dying
    with pytest.raises(RankLost):
        hit.replay.take_again(11)
    assert hit.step == 10
    hit.consistency_check.compare(hit.step)  # what all do next, whoever is left
    assert state(hit) == state(calm)
