"""Legend: B rows of a micro-batch, G rows of a global batch, T tokens, V vocabulary."""

import hashlib
import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.data.tokens import Sequences
from tf_dist.errors import DataError, LaunchError, NumericError, UsageError
from tf_dist.models.build import build
from tf_dist.training.trainer import Trainer, weights_sha256

V, T, G = 11, 8, 8
TINY = {"vocab_size": V, "seq_len": T, "width": 16, "layers": 1, "heads": 2}


def bigram(seed=0):
    """The smallest language model: a table of logits."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, V)])


def trainer_of(model=None, optimizer=None, **values):
    settings = {"global_batch_size": G, "micro_batch_size": 4, "clip_norm": 0.0, **values}
    return Trainer(model or bigram(), optimizer or keras.optimizers.SGD(1.0), SerialComm(), **settings)


def text(count, seed=0):
    return np.random.default_rng(seed).integers(0, V, count).astype(np.uint16)


def mean_loss(model, tokens):
    """Nats per token, over every token but the first, one window at a time."""
    total = 0.0
    for start in range(0, len(tokens) - 1, T):
        window = tokens[start : start + T + 1].astype(np.int64)
        x = np.zeros((1, T), np.int32)
        x[0, : len(window) - 1] = window[:-1]
        logits = model(x).numpy()[0, : len(window) - 1].astype(np.float64)
        log_chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_chances[np.arange(len(window) - 1), window[1:]].sum()
    return total / (len(tokens) - 1)


@pytest.fixture
def made():
    """A trainer that several tests may use when they do not look at what is in it."""
    return trainer_of()


# Learning -----------------------------------------------------------------------------------------


def test_the_loss_of_a_repetitive_text_falls():
    tokens = np.tile(np.arange(V, dtype=np.uint16), 60)
    trainer = trainer_of(build(Config(**TINY)), keras.optimizers.Adam(0.01), clip_norm=1.0)
    history = trainer.fit(tokens, steps=40, validation=tokens[:100], eval_every=20)
    assert history["loss"][0] < math.log(V) + 0.5
    assert history["val_loss"][-1] < 0.5
    assert history["val_accuracy"][-1] > 0.9
    assert len(history["loss"]) == 2


def test_both_updates_give_the_same_bits():
    digests = set()
    for update in ("allreduce", "master"):
        trainer = trainer_of(optimizer=keras.optimizers.Adam(0.01), update=update, clip_norm=0.1)
        trainer.fit(text(500), steps=5)
        digests.add(weights_sha256(trainer.model))
    assert len(digests) == 1


def test_a_run_is_a_function_of_its_seed():
    def digest(seed):
        trainer = trainer_of(build(Config(dropout=0.2, **TINY)), seed=seed)
        trainer.fit(text(300), steps=3)
        return weights_sha256(trainer.model)

    assert digest(1) == digest(1) != digest(2)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_the_micro_batch_hardly_matters(rows):
    expected, trainer = trainer_of(clip_norm=0.5), trainer_of(micro_batch_size=rows, clip_norm=0.5)
    for one in (expected, trainer):
        one.fit(text(301), steps=6)
    assert trainer.tokens == expected.tokens
    for a, b in zip(trainer.model.weights, expected.model.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)


def test_one_step_is_the_mean_gradient_over_tokens():
    # Windows of 8, 8, 8 and 3 targets: a mean of the micro-batches' means would be another number.
    tokens, trainer = text(28), trainer_of(global_batch_size=4, micro_batch_size=1)
    before = trainer.model.weights[0].numpy().astype(np.float64)
    expected = np.zeros((V, V))
    for x, y in itertools.pairwise(tokens):
        chances = np.exp(before[x]) / np.exp(before[x]).sum()
        expected[x] += chances - np.eye(V)[y]
    expected /= len(tokens) - 1
    loss = mean_loss(trainer.model, tokens)
    sequences = trainer.sequences(tokens)
    logs = trainer.train_step(sequences, trainer.sampler(sequences))
    np.testing.assert_allclose(trainer.model.weights[0].numpy(), before - expected, atol=1e-6)
    assert logs["loss"] == pytest.approx(loss, rel=1e-6)
    assert logs["tokens"] == 27
    assert logs["grad_norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-5)


# Counting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [8 * T + 1, 8 * T + 2, 20 * T, 20 * T + 1, 23 * T - 3])
def test_each_token_is_a_target_once_per_epoch(count):
    trainer = trainer_of()
    trainer.fit(text(count), epochs=2)
    assert trainer.step == 2 * math.ceil(math.ceil((count - 1) / T) / G)
    assert trainer.tokens == 2 * (count - 1)
    assert trainer.elapsed_s > 0


def test_a_second_fit_trains_as_much_again():
    tokens, once, twice = text(20 * T), trainer_of(), trainer_of()
    once.fit(tokens, steps=7)
    first = twice.fit(tokens, steps=4)
    assert twice.step == 4
    second = twice.fit(tokens, steps=3)
    assert (twice.step, twice.tokens) == (once.step, once.tokens)
    assert weights_sha256(twice.model) == weights_sha256(once.model)
    assert first["loss"] and second["loss"]
    twice.fit(tokens, epochs=2)
    assert twice.step == 7 + 2 * 3


def test_a_fit_that_an_error_has_left_is_gone_on_with():
    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if trainer.step == 2:
                raise ZeroDivisionError

    trainer = trainer_of()
    with pytest.raises(ZeroDivisionError):
        trainer.fit(text(20 * T), steps=5, callbacks=[Fails()])
    trainer.fit(text(20 * T), steps=5)
    assert trainer.step == 5


def test_nothing_is_trained_silently(made):
    for nothing in ({"steps": 0}, {"steps": -1}, {"epochs": 0}, {"steps": 2, "eval_every": -1}):
        with pytest.raises(UsageError, match="at least"):
            made.fit(text(20 * T), **nothing)
    made.state.step = 5  # as after a resume
    with pytest.warns(UserWarning, match="step 5 is reached already"):
        assert made.fit(text(20 * T), steps=5) == {}


def test_one_epoch_is_the_default(made):
    made.fit(text(20 * T))
    assert made.step == 3


def test_sequences_may_be_given_as_such(made):
    made.fit(Sequences(text(20 * T), T), steps=1)
    assert made.step == 1


# Validation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [2, T, T + 1, 5 * T + 4])
def test_validation_is_exact_whatever_the_micro_batch(rows, count):
    tokens, trainer = text(count, seed=5), trainer_of(micro_batch_size=rows)
    logs = trainer.validate(tokens, text_bytes=100)
    expected = mean_loss(trainer.model, tokens)
    assert logs["val_loss"] == pytest.approx(expected, abs=1e-6)
    assert logs["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert logs["bits_per_byte"] == pytest.approx(expected * (count - 1) / math.log(2) / 100, rel=1e-5)
    assert 0 <= logs["val_accuracy"] <= 1


def test_bits_per_byte_only_where_bytes_are_known(made):
    assert "bits_per_byte" not in made.validate(text(50))


def test_validation_has_no_dropout_and_changes_nothing():
    trainer = trainer_of(build(Config(dropout=0.5, **TINY)))
    before = weights_sha256(trainer.model)
    assert trainer.validate(text(50)) == trainer.validate(text(50))
    assert weights_sha256(trainer.model) == before


def test_validation_when_it_was_asked_for(made):
    history = made.fit(text(20 * T), steps=7, validation=text(50), eval_every=3)
    assert len(history["val_loss"]) == len(history["loss"]) == 3
    history = made.fit(text(20 * T), steps=9, validation=text(50))
    assert "val_loss" not in history


@pytest.mark.parametrize("count", [0, 1])
def test_no_validation_text(made, count):
    with pytest.raises(DataError, match="there is no validation text") as caught:
        made.validate(text(count))
    assert caught.value.exit_code == 65


# Stopping and callbacks ---------------------------------------------------------------------------


def test_a_request_to_stop_ends_after_the_next_step(made):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:
                made.request_stop()

    made.fit(text(20 * T), steps=50, callbacks=[Stop()])
    assert made.stopped
    assert made.step == 2
    made.fit(text(20 * T), steps=2)  # a new fit is a new beginning
    assert (made.step, made.stopped) == (4, False)


def test_early_stopping_stops_and_restores():
    trainer = trainer_of(optimizer=keras.optimizers.SGD(0.0))
    before = weights_sha256(trainer.model)
    stop = keras.callbacks.EarlyStopping(monitor="val_loss", patience=2, restore_best_weights=True)
    trainer.fit(text(20 * T), steps=50, validation=text(50), eval_every=1, callbacks=[stop])
    assert trainer.stopped
    assert trainer.step == 3
    assert weights_sha256(trainer.model) == before


def test_callbacks_see_keras_protocol(made):
    class Log(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_train_begin(self, logs=None):
            self.seen.append(("begin", self.params["epochs"], self.params["steps"]))

        def on_epoch_begin(self, epoch, logs=None):
            self.seen.append(("epoch", epoch))

        def on_train_batch_begin(self, batch, logs=None):
            self.seen.append(("batch", batch))

        def on_train_batch_end(self, batch, logs=None):
            assert set(logs) >= {"loss", "accuracy", "grad_norm", "tokens"}
            assert self.model.optimizer is made.optimizer

        def on_epoch_end(self, epoch, logs=None):
            self.seen.append(("end", epoch, "val_loss" in logs))

        def on_train_end(self, logs=None):
            self.seen.append(("done", "loss" in logs))

    log = Log()
    made.fit(text(20 * T), steps=3, validation=text(50), eval_every=2, callbacks=[log])
    assert log.seen == [
        ("begin", 2, 2),
        ("epoch", 0), ("batch", 0), ("batch", 1), ("end", 0, True),
        ("epoch", 1), ("batch", 0), ("end", 1, True),
        ("done", True),
    ]  # fmt: skip


def test_stock_callbacks_count_the_batches_of_an_epoch(tmp_path, capsys, monkeypatch):
    trainer, saved = trainer_of(), []
    monkeypatch.setattr(trainer.model, "save_weights", lambda filepath, **_: saved.append(trainer.step))
    k = keras.callbacks
    checkpoint = k.ModelCheckpoint(tmp_path / "{epoch}-{batch}.keras", save_freq=2)
    backup = k.BackupAndRestore(tmp_path / "backup", save_freq=2)
    callbacks = [checkpoint, backup, k.ProgbarLogger()]
    trainer.fit(text(20 * T), steps=9, validation=text(50), eval_every=3, callbacks=callbacks)
    assert saved == [2, 4, 6, 8]
    assert {path.name for path in tmp_path.glob("*.keras")} == {
        f"{n}.keras" for n in ("1-2", "2-1", "2-3", "3-2")
    }
    bar = capsys.readouterr().out
    assert "Epoch 3/3" in bar and "3/3" in bar.rsplit("Epoch", 1)[1] and "4/3" not in bar


def test_the_loss_of_an_epoch_is_weighed_by_tokens(made):
    # 9 windows in batches of 8 and 1: the mean of the two means would be another number.
    made.optimizer.learning_rate.assign(0.0)
    tokens = text(9 * T + 1)
    history = made.fit(tokens, epochs=1)
    assert history["loss"] == [pytest.approx(mean_loss(made.model, tokens), rel=1e-6)]


def test_keras_changes_of_the_learning_rate_are_heard():
    trainer = trainer_of()
    before = weights_sha256(trainer.model)
    off = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.0)
    trainer.fit(text(20 * T), steps=2, eval_every=1, callbacks=[off])
    assert weights_sha256(trainer.model) == before


# Models and refusals ------------------------------------------------------------------------------


def test_a_subclassed_model_trains():
    class Bigram(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = layers.Embedding(V, V)

        def call(self, tokens):
            return self.table(tokens)

    tokens = np.tile(np.arange(V, dtype=np.uint16), 40)
    trainer = trainer_of(Bigram(), keras.optimizers.Adam(0.1), seq_len=T)
    assert trainer.fit(tokens, steps=20, eval_every=10)["loss"][-1] < 1.0


def test_seq_len_is_what_the_model_says():
    assert trainer_of().seq_len == T
    assert (
        trainer_of(seq_len=5, model=keras.Sequential([keras.Input((None,)), layers.Embedding(V, V)])).seq_len
        == 5
    )
    assert (
        trainer_of(model=keras.Sequential([keras.Input((None,)), layers.Embedding(V, V)])).seq_len
        == Config.seq_len
    )


def test_the_micro_batch_is_a_quarter_by_default():
    assert trainer_of(global_batch_size=12, micro_batch_size=None).rows == 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"update": "rumour"}, "unknown strategy 'rumour': allreduce, master"),
        (
            {"global_batch_size": 10, "micro_batch_size": 4},
            "micro_batch_size 4 does not divide global_batch_size 10",
        ),
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"micro_batch_size": -4}, "micro_batch_size"),
    ],
)
def test_refused(values, said):
    with pytest.raises(UsageError) as caught:
        trainer_of(**values)
    assert said in str(caught.value)
    assert caught.value.exit_code == 64


@pytest.mark.parametrize("count", [0, 1, 7 * T + 1])
def test_too_few_sequences(made, count):
    with pytest.raises(DataError, match=f"fewer than one global batch of {G}") as caught:
        made.fit(text(count), steps=1)
    assert caught.value.exit_code == 65
    made.fit(text(7 * T + 2), steps=1)  # one token more


def test_learning_that_explodes_is_a_numeric_error():
    trainer = trainer_of(build(Config(**TINY)), keras.optimizers.SGD(1e30))
    with pytest.raises(NumericError, match="--learning-rate") as caught:
        trainer.fit(text(20 * T), steps=20)
    assert caught.value.exit_code == 76
    assert (trainer.step, trainer.state.skipped.total) == (
        12,
        11,
    )  # one, ten skipped, and one too many
    assert trainer.step - trainer.state.skipped.total == int(trainer.optimizer.iterations.numpy())


def poisoned(trainer, steps):
    """Let the second micro-batch of some steps have a gradient with NaN, in its last element."""
    gradients = trainer.replica.gradients

    def poison(x, y, draw):
        gradient, sums = gradients(x, y, draw)
        if draw[0] in steps and draw[1] == 1:
            gradient = np.array(gradient)
            gradient[-1] = np.nan
        return gradient, sums

    trainer.replica.gradients = poison
    return trainer


def test_a_bad_step_uses_up_its_batch_and_changes_nothing(told):
    """As if the learning rate of that step had been 0, and its optimizer had not counted it."""
    sequences = Sequences(text(60 * T + 1), T)
    bad = poisoned(trainer_of(optimizer=keras.optimizers.Adam(0.1)), {2, 3})
    good = trainer_of(optimizer=keras.optimizers.Adam(0.1))
    sampler = good.sampler(sequences)
    logs = [bad.train_step(sequences, sampler) for _ in range(6)]
    for step in (0, 1, 4, 5):
        good.state.step = step
        good.train_step(sequences, sampler)
    assert [math.isfinite(log["grad_norm"]) for log in logs] == [True, True, False, False, True, True]
    assert bad.state.counters == [6, 6 * G * T, 2, 0]
    for one, other in zip(bad.optimizer.variables, good.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert bad.check_equal() == weights_sha256(good.model)
    said = told.messages
    assert [line.split(":")[0] for line in said] == [
        "step 3 was skipped (1 in a row, and --max-bad-steps is 10)",
        "step 4 was skipped (2 in a row, and --max-bad-steps is 10)",
    ]
    path = bad.model.trainable_variables[-1].path
    assert all(f"on rank 0, first in {path}" in line and "loss:" not in line for line in said)


@pytest.mark.parametrize("most", [0, 2])
def test_too_many_bad_steps_end_the_run_after_what_is_good_was_kept(most):
    trainer = poisoned(trainer_of(max_bad_steps=most), {1, *range(3, 9)})
    kept = []
    trainer.nonfinite_gradients.before_giving_up.append(
        lambda: kept.append((trainer.step, trainer.check_equal()))
    )
    with pytest.raises(NumericError, match=f"no weight has changed .*--max-bad-steps is {most}") as caught:
        trainer.fit(text(60 * T), steps=20)
    assert caught.value.exit_code == 76 and "on rank 0, first in " in str(caught.value)
    assert kept == [(2 if most == 0 else 6, weights_sha256(trainer.model))]
    assert trainer.state.counters[2:] == [
        1 if most == 0 else 4,
        0,
    ]  # who goes on counts anew


def test_weights_that_are_not_finite_end_the_run_at_once():
    trainer = trainer_of()
    weight = trainer.model.weights[0]
    weight.assign(np.full(weight.shape, np.nan, np.float32))
    trainer.nonfinite_gradients.before_giving_up.append(lambda: pytest.fail("there is nothing to keep"))
    with pytest.raises(NumericError, match=f"in step 1 .*first in {weight.path}.*no later step could be"):
        trainer.fit(text(60 * T), steps=3)


def test_the_loss_of_bad_steps_is_not_in_means():
    """A micro-batch whose loss is NaN, too."""
    trainer = trainer_of()
    gradients = trainer.replica.gradients

    def poison(x, y, draw):
        gradient, sums = gradients(x, y, draw)
        return (gradient * np.nan, sums * [np.nan, 1, 1]) if draw[0] == 1 else (gradient, sums)

    trainer.replica.gradients = poison
    logs = trainer.fit(text(24 * T + 1), epochs=2)
    assert trainer.state.skipped.total == 1 and len(logs["loss"]) == 2
    assert np.isfinite(logs["loss"]).all()


def test_replicas_that_drifted_are_named(made, monkeypatch):
    assert made.check_equal() == weights_sha256(made.model)

    def with_two_others(mine):
        """Rank 1 holds what we hold, rank 2 another first weight."""
        return [mine, mine, [mine[0] + 1, *mine[1:]] if isinstance(mine, list) else 0]

    monkeypatch.setattr(made.comm, "allgather_obj", with_two_others)
    path = made.model.weights[0].path
    with pytest.raises(LaunchError, match=f"before step 1 .*: rank 2 differs from ranks 0, 1 in {path}"):
        made.check_equal()


def test_the_sha256_of_weights_is_canonical():
    model = bigram()
    expected = hashlib.sha256(model.weights[0].numpy().astype("<f4").tobytes()).hexdigest()
    assert weights_sha256(model) == expected


def test_a_model_with_random_numbers_of_its_own_is_warned_of():
    model = bigram()
    model.add(layers.Lambda(lambda x: x + tf.random.uniform((2, T, V))))
    with pytest.warns(UserWarning, match=r"RandomUniform.*Use keras.random"):
        trainer_of(model, micro_batch_size=2).fit(text(200), steps=1)
