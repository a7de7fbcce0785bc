"""`tf_dist.callbacks` in one process: what they refuse, and their arithmetic. Over ranks: tests/mpi."""

import itertools
import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import tf_dist
from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError, UsageError
from tf_dist.keras_callbacks import callbacks as module

c = tf_dist.callbacks


class Pair(SerialComm):
    """Rank 0 of two: the other has the same numbers, and answers what ``other`` makes of our objects."""

    size = 2

    def __init__(self, other=lambda value: value):
        super().__init__()
        self.other = other

    def _allreduce(self, array):
        array *= 2

    def _allgather_bytes(self, raw):
        *purpose, value = json.loads(raw)
        return [raw, json.dumps([*purpose, self.other(value)]).encode()]


def model_of(optimizer=None, metrics=None):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse", metrics=metrics, run_eagerly=True)
    model.optimizer.build(model.trainable_variables)
    return model


def attached(callback, model=None, **params):
    callback.set_model(model or model_of())
    callback.set_params(params)
    return callback


# LearningRateWarmup -------------------------------------------------------------------------------


def rates(callback, steps):
    """The learning rate of each step."""
    callback.on_train_begin()
    optimizer = callback.model.optimizer
    found = []
    for batch in range(steps):
        callback.on_train_batch_begin(batch)
        found.append(float(optimizer.learning_rate))
        optimizer.iterations.assign_add(1)
    return found


@pytest.mark.parametrize("lengths", [{}, {"epochs": 1, "steps": 1}, {"epochs": -1}, {"steps": -3}])
def test_warmup_takes_one_length(lengths):
    with pytest.raises(UsageError, match="epochs or steps"):
        c.LearningRateWarmup(SerialComm(), **lengths)


def test_warmup_by_epochs():
    """From the optimizer's rate to that of two ranks, over 2 epochs of 3 steps."""
    warmup = attached(c.LearningRateWarmup(Pair(), epochs=2), steps=3)
    expected = [0.1 + 0.1 * step / 6 for step in range(1, 7)]
    assert rates(warmup, 8) == pytest.approx([*expected, 0.2, 0.2])


def test_warmup_by_steps_between_given_ends():
    warmup = attached(c.LearningRateWarmup(Pair(), steps=4, start=0.0, target=1.0))
    assert rates(warmup, 5) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_warmup_leaves_the_rate_alone_afterwards():
    warmup = attached(c.LearningRateWarmup(Pair(), steps=2))
    rates(warmup, 2)
    warmup.model.optimizer.learning_rate = 0.03  # as ReduceLROnPlateau does
    warmup.on_train_batch_begin(2)
    assert float(warmup.model.optimizer.learning_rate) == pytest.approx(0.03)


def test_warmup_goes_on_in_the_middle():
    model = model_of()
    warmup = attached(c.LearningRateWarmup(Pair(), steps=4, start=0.0, target=1.0), model)
    before = rates(warmup, 2)
    resumed = attached(c.LearningRateWarmup(Pair(), steps=4, start=0.0, target=1.0), model)
    assert before + rates(resumed, 3) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_warmup_does_nothing_when_resumed_later():
    model = model_of()
    model.optimizer.iterations.assign(4)
    assert rates(attached(c.LearningRateWarmup(Pair(), steps=4), model), 2) == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("params", [{}, {"steps": None}])
def test_warmup_by_epochs_of_unknown_length(params):
    with pytest.raises(UsageError, match="give steps= instead"):
        attached(c.LearningRateWarmup(SerialComm(), epochs=1), **params).on_train_begin()


def test_warmup_refuses_a_schedule():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    model = model_of(keras.optimizers.SGD(schedule))
    with pytest.raises(UsageError, match="is a schedule"):
        attached(c.LearningRateWarmup(SerialComm(), steps=1), model).on_train_begin()


def test_warmup_sets_the_rate_inside_a_loss_scale_optimizer():
    model = model_of(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    attached(warmup := c.LearningRateWarmup(Pair(), steps=1), model).on_train_begin()
    warmup.on_train_batch_begin(0)
    assert float(model.optimizer.inner_optimizer.learning_rate) == pytest.approx(0.2)


# SyncCheck ----------------------------------------------------------------------------------------


def test_sync_check_refuses_a_negative_interval():
    with pytest.raises(UsageError, match="every=-1"):
        c.SyncCheck(SerialComm(), every=-1)


@pytest.mark.parametrize(("every", "expected"), [(0, [0, 0, 0, 0, 1]), (2, [0, 1, 0, 1, 1])])
def test_sync_check_talks_when_it_is_time(every, expected):
    comm = Pair()
    check = attached(c.SyncCheck(comm, every=every))
    talked = []
    for hook in [lambda: check.on_train_batch_end(0)] * 4 + [check.on_train_end]:
        before = comm.calls
        hook()
        talked.append(comm.calls - before)
    assert talked == expected


def test_sync_check_only_at_the_end_finds_a_drift():
    def other(value):
        """Another number in the place of each checksum."""
        if isinstance(value, list):
            return [digest + 1 for digest in value]
        return value + 1 if isinstance(value, int) else value

    check = attached(c.SyncCheck(Pair(other), every=0))
    check.on_train_batch_end(0)
    with pytest.raises(LaunchError, match=r"at the end, after batch 1, rank 0 and rank 1 differ in .*kernel"):
        check.on_train_end()


# Throughput ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"every": 0}, {"every": -1}, {"smoothing": 1.0}, {"smoothing": -0.1}])
def test_throughput_refuses_bad_numbers(bad):
    with pytest.raises(UsageError, match="Throughput"):
        c.Throughput(SerialComm(), **bad)


def slow(monkeypatch, seconds):
    """Batches take these seconds, and a minute between them does not count."""
    ticks = itertools.chain.from_iterable((60.0 * i, 60.0 * i + s) for i, s in enumerate(seconds))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))


def measured(monkeypatch, throughput, seconds, **logs):
    """The logs of batches that take these seconds."""
    slow(monkeypatch, seconds)
    throughput.on_train_begin()
    throughput.on_epoch_begin(0)
    found = []
    for batch in range(len(seconds)):
        throughput.on_train_batch_begin(batch)
        found.append(dict(logs))
        throughput.on_train_batch_end(batch, found[-1])
    return found


def test_throughput_is_that_of_all_ranks_and_fades(monkeypatch):
    throughput = attached(c.Throughput(Pair(), batch_size=10, tokens_per_sample=3, every=2, smoothing=0.5))
    found = measured(monkeypatch, throughput, [9.0, 2.0, 1.0, 0.5, 4.0])
    first = {"samples_per_s": 2 * 10 / 2.0, "tokens_per_s": 3 * 2 * 10 / 2.0}
    # Twice 10 samples in 1.5 s, and half of what was before: 10 samples in 2 s; on two ranks.
    samples = 2 * (20 + 10 / 2) / (1.5 + 2.0 / 2)
    second = {"samples_per_s": samples, "tokens_per_s": 3 * samples}
    assert found == [{}, first, first, second, second]  # the first batch is compiled and does not count
    end = {}
    throughput.on_epoch_end(0, end)
    samples = 2 * (10 + 25 / 2) / (4.0 + 2.5 / 2)
    assert end == {"samples_per_s": samples, "tokens_per_s": 3 * samples}


def test_throughput_counts_the_tokens_of_our_trainer(monkeypatch):
    """They are those of all ranks already; samples follow from them."""
    throughput = attached(c.Throughput(Pair(), tokens_per_sample=8, every=1))
    found = measured(monkeypatch, throughput, [1.0, 2.0], tokens=64.0)
    assert found[1] == {"tokens": 64.0, "samples_per_s": 64 / 8 / 2.0, "tokens_per_s": 64 / 2.0}


def test_throughput_counts_what_keras_counts(monkeypatch):
    """Also a smaller batch at the end, and in a second epoch, when Keras counts from 0 again."""
    slow(monkeypatch, [9.0, 2.0, 1.0, 2.0, 2.0, 2.0])
    x = np.ones((16, 2), np.float32)
    throughput = c.Throughput(SerialComm(), every=99, smoothing=0.0)
    history = model_of().fit(x, x[:, :1], batch_size=6, epochs=2, verbose=0, callbacks=[throughput]).history
    assert history["samples_per_s"] == [(6 + 4) / (2.0 + 1.0), (6 + 6 + 4) / 6.0]


def test_throughput_of_one_batch_is_not_known(monkeypatch):
    throughput = attached(c.Throughput(SerialComm(), batch_size=4, every=1))
    assert measured(monkeypatch, throughput, [1.0]) == [{}]
    throughput.on_epoch_end(0, logs := {})
    assert logs == {}


# AverageMetrics -----------------------------------------------------------------------------------


class Peak(keras.metrics.Metric):
    """The largest target: the sum of two ranks' states would mean nothing."""

    sums_over_ranks = False

    def __init__(self, name="peak"):
        super().__init__(name=name)
        self.peak = self.add_weight(shape=(), initializer="zeros", name="peak")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.peak.assign(keras.ops.maximum(self.peak, keras.ops.max(y_true)))

    def result(self):
        return keras.ops.convert_to_tensor(self.peak)


def test_average_metrics_of_what_cannot_be_summed():
    """The mean of the ranks' values, weighted by samples; what can be summed is not touched by that."""

    def other(value):
        if not isinstance(value, list) or not isinstance(value[-1], dict):
            return value
        samples, logs = value
        return [3 * samples, {**logs, "peak": 9.0, "loss": 1e9}]

    model = model_of(metrics=[Peak(), "mae"])
    x = np.array([[0, 1], [2, 3], [4, 5], [1, 1]], np.float32)
    logs = dict(model.evaluate(x, x[:, 1:], verbose=0, return_dict=True))
    before = dict(logs)
    assert before["peak"] == 5.0
    attached(c.AverageMetrics(Pair(other)), model).on_test_end(logs)
    assert logs["peak"] == pytest.approx((1 * 5.0 + 3 * 9.0) / 4)
    assert logs == pytest.approx({**before, "peak": logs["peak"]})
    assert float(model.metrics[1].metrics[0].result()) == 5.0  # this rank's state stays its own


def test_average_metrics_of_ranks_with_other_metrics():
    comm = Pair(lambda kinds_and_size: [*kinds_and_size[:-1], kinds_and_size[-1] + 1])
    model = model_of()
    x = np.ones((4, 2), np.float32)
    logs = dict(model.evaluate(x, x[:, :1], verbose=0, return_dict=True))
    with pytest.raises(LaunchError, match="different metrics"):
        attached(c.AverageMetrics(comm), model).on_test_end(logs)


def test_broadcast_weights_of_other_models():
    comm = Pair(lambda layout: layout + 1)
    with pytest.raises(LaunchError, match="build all alike"):
        attached(c.BroadcastWeights(comm)).on_train_begin()
