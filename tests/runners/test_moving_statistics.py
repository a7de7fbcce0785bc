"""Weights that a model changes itself. Legend: B rows of a micro-batch, T tokens, V vocabulary."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import UsageError
from tf_dist.training.trainer import Trainer

V, T, B = 7, 4, 2
TOKENS = np.arange(400) ** 2 % V


def sequential(*more, out=V):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input((T,), dtype="int32"), layers.Embedding(V, 3), *more, layers.Dense(out)]
    )


def trainer_of(model, update="allreduce", **values):
    settings = {
        "global_batch_size": 3 * B,
        "micro_batch_size": B,
        "autotune": "off",
        "clip_norm": 0.0,
        **values,
    }
    return Trainer(model, keras.optimizers.SGD(0.1), SerialComm(), update, **settings)


def step(trainer):
    sequences = trainer.sequences(TOKENS)
    return trainer.train_step(sequences, trainer.sampler(sequences))


def batches(trainer):
    sequences = trainer.sequences(TOKENS)
    rows = trainer.sampler(sequences).batch(0).reshape(3, B)
    return [sequences.rows(one)[0] for one in rows]


@pytest.mark.parametrize(
    ("update", "more"),
    [
        ("allreduce", {}),
        ("allreduce", {"xla": "on"}),
        ("allreduce", {"autotune": "full"}),
        ("zero", {"zero_stage": 2}),
    ],
    ids=["plain", "xla", "timed", "zero 2"],
)
def test_a_step_moves_the_mean_of_its_micro_batches(update, more):
    norm = layers.BatchNormalization(momentum=0.9)
    model = sequential(norm)
    trainer = trainer_of(model, update, **more)
    came = [model.layers[0](x).numpy().reshape(-1, 3).astype(np.float64) for x in batches(trainer)]
    step(trainer)
    assert len(trainer.replica.moving.variables) == 2
    mean = np.mean([one.mean(axis=0) for one in came], axis=0)
    variance = np.mean([one.var(axis=0) for one in came], axis=0)
    np.testing.assert_allclose(norm.moving_mean.numpy(), 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(norm.moving_variance.numpy(), 0.9 + 0.1 * variance, atol=1e-6)


def test_nothing_moves_in_a_step_that_is_skipped(monkeypatch):
    norm = layers.BatchNormalization()
    trainer = trainer_of(sequential(norm))
    step(trainer)
    before = norm.moving_mean.numpy()
    plain = trainer.replica.gradients
    monkeypatch.setattr(
        trainer.replica, "gradients", lambda *a: (np.full_like(plain(*a)[0], np.nan), plain(*a)[1])
    )
    assert not np.isfinite(step(trainer)["grad_norm"])
    np.testing.assert_array_equal(norm.moving_mean.numpy(), before)


def test_an_inner_layer_and_a_counter():
    class Counts(layers.Layer):
        def build(self, shape):
            self.calls = self.add_weight(shape=(), dtype="int32", trainable=False, initializer="zeros")
            self.table = self.add_weight(shape=(5,), trainable=False, initializer="ones")  # never changes

        def call(self, x, training=False):
            if training:
                self.calls.assign_add(1)
            return x * self.table[0]

    counts = Counts()
    inner = keras.Sequential([counts, layers.BatchNormalization()])
    trainer = trainer_of(sequential(inner))
    step(trainer)
    step(trainer)
    assert int(counts.calls.numpy()) == 2  # steps, whatever the number of micro-batches
    assert [v.path.split("/")[-1] for v in trainer.replica.moving.variables][1:] == [
        "moving_mean", "moving_variance",
    ]  # fmt: skip


def test_a_frozen_one_costs_nothing():
    trainer = trainer_of(sequential(layers.BatchNormalization(trainable=False), layers.Dropout(0.1)))
    step(trainer)
    assert not trainer.replica.moving


def hidden():
    class Hidden(layers.Layer):
        def build(self, shape):
            self.__dict__["state"] = [tf.Variable(1.0, trainable=False)]

        def call(self, x, training=False):
            if training:
                self.__dict__["state"][0].assign_add(1.0)
            return x * self.__dict__["state"][0]

    return sequential(Hidden())


@pytest.mark.parametrize(
    ("make", "update", "more", "said"),
    [
        (
            lambda: sequential(layers.BatchNormalization()),
            "local-sgd",
            {},
            "moving_mean by itself.*LayerNorm",
        ),
        (lambda: sequential(layers.BatchNormalization()), "easgd", {}, "moving_mean by itself.*easgd"),
        (lambda: sequential(layers.BatchNormalization()), "zero", {"zero_stage": 3}, "is BatchNormalization"),
        (lambda: sequential(layers.BatchNormalization(synchronized=True)), "allreduce", {}, "synchronized"),
        (hidden, "allreduce", {}, "no weight of the model.*add_weight"),
    ],
)
def test_what_ranks_could_not_keep_equal(make, update, more, said):
    with pytest.raises(UsageError, match=said):
        step(trainer_of(make(), update, **more))
