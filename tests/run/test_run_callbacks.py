"""What `LogRun` writes, whatever the numbers of steps between rows, validations and the end."""

import json
import math

import keras
import numpy as np
import pytest
from keras import layers

from tf_dist.comm.transport.base import SerialComm
from tf_dist.optim.lr_schedules import schedule
from tf_dist.run.run_callbacks import LogRun
from tf_dist.run.run_folder import RunFolder, read_metrics
from tf_dist.runners.replica import Replica
from tf_dist.training.train_state import MetricsAccumulator
from tf_dist.training.trainer import Trainer

V, T, G = 11, 8, 8
TOKENS = np.resize(np.arange(V, dtype=np.uint16), 601)  # 75 whole sequences


@pytest.fixture
def rows(tmp_path):
    """``rows(steps, every, eval_every)``: the metrics of a small run."""

    def train(steps, every, eval_every=0):
        run = RunFolder(tmp_path / "run", SerialComm())
        run.open()
        model = keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, V)])
        optimizer = keras.optimizers.SGD(schedule("linear", 10, 1.0, 0.0, 4))
        trainer = Trainer(
            model, optimizer, SerialComm(), clip_norm=0.0, global_batch_size=G, micro_batch_size=4
        )
        log = LogRun(trainer, run, every, 10)
        held_out = TOKENS[-99:] if eval_every else None
        trainer.fit(TOKENS, steps=steps, validation=held_out, eval_every=eval_every, callbacks=[log])
        return read_metrics(run.metrics)

    return train


def test_a_run_that_ends_between_two_rows(rows):
    """The last steps count, too: `--steps 5` with rows every 10 steps once left no loss behind."""
    first, last = rows(7, 5)
    assert (first["step"], last["step"]) == (5, 7)
    assert last["loss"] < first["loss"]
    assert (first["tokens"], last["tokens"]) == (5 * G * T, 7 * G * T)
    assert last["learning_rate"] == pytest.approx(2 / 3)  # of step 7: 4 to rise, then 6 to fall


def test_a_loss_counts_by_its_tokens():
    tally = MetricsAccumulator()
    for loss, tokens in [(2.0, 30.0), (math.nan, 20.0), (4.0, 10.0)]:
        tally.add(loss, tokens)
    assert tally.facts == [2.0 * 30 + 4.0 * 10, 40.0, 60.0, 3]


def test_a_short_run_with_a_validation_is_one_row(rows):
    (row,) = rows(3, 10, eval_every=3)
    assert row["step"] == 3
    assert row["loss"] > 0 and row["val_loss"] > 0
    assert row["learning_rate"] == pytest.approx(0.75)


def test_a_validation_between_two_rows_is_a_row(rows):
    found = [(row["step"], row["loss"] is None, row["val_loss"] is None) for row in rows(8, 4, eval_every=3)]
    assert found == [(3, True, False), (4, False, True), (6, True, False), (8, False, False)]


def test_steps_that_were_skipped(rows, monkeypatch):
    """They are counted, have no learning rate of their own, and what is no number is no part of a mean."""
    gradients, spoiled = Replica.gradients, {1: 1.0, 4: np.nan, 5: np.nan}

    def inject_nan(self, x, y, draw):
        gradient, sums = gradients(self, x, y, draw)
        factor = spoiled.get(draw[0])
        return (gradient, sums) if factor is None else (gradient * np.nan, sums * [factor, 1, 1])

    monkeypatch.setattr(Replica, "gradients", inject_nan)
    found = rows(8, 2)
    assert [row["bad_steps"] for row in found] == [1, 1, 3, 3]
    assert [row["loss"] is None for row in found] == [False, False, True, False]
    assert [row["grad_norm"] is None for row in found] == [True, False, True, False]
    assert found[-1]["learning_rate"] == pytest.approx(1.0)  # the fifth that was taken, and no step 8
    assert [row["tokens"] for row in found] == [2 * G * T, 4 * G * T, 6 * G * T, 8 * G * T]


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        ([5, 10], [5, 10]),
        ([5], [5, 10]),  # the last row was with the thread that writes
        ([5, 10, 15], [5, 10]),  # whoever died was a step ahead
    ],
)
@pytest.mark.parametrize("half", ["", '{"step": 10, "lo'])
def test_rank_0_dies_and_the_next_one_has_the_files(tmp_path, left, kept, half):
    run = RunFolder(tmp_path, SerialComm())
    run.open()
    model = keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, V)])
    trainer = Trainer(
        model, keras.optimizers.SGD(0.1), SerialComm(), clip_norm=0.0, global_batch_size=G, micro_batch_size=4
    )
    trainer.fit(TOKENS, steps=10, callbacks=[LogRun(trainer, run, 5, 10)])
    rows = {row["step"]: row for row in read_metrics(run.metrics)}
    lines = [json.dumps(rows.get(step, {"step": step})) + "\n" for step in left]
    run.metrics.write_text("".join(lines) + half)
    (take_over,) = trainer.in_place.when_first
    take_over()
    assert read_metrics(run.metrics) == [rows[step] for step in kept]
    assert run.metrics.read_text().endswith("}\n")


def test_rank_0_dies_before_this_rank_knows_of_a_row(tmp_path):
    run = RunFolder(tmp_path, SerialComm())
    run.open()
    model = keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, V)])
    trainer = Trainer(
        model, keras.optimizers.SGD(0.1), SerialComm(), clip_norm=0.0, global_batch_size=G, micro_batch_size=4
    )
    trainer.state.step = 20  # resumed
    LogRun(trainer, run, 5, 10)
    for step in (20, 25):
        run.log_metrics({"step": step})
    (take_over,) = trainer.in_place.when_first
    take_over()
    assert [row["step"] for row in read_metrics(run.metrics)] == [20]
