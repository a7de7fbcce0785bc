"""Tokens of another tokenizer than the model was made for."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_dist.comm.transport.base import SerialComm
from tf_dist.data import tokens as tokens_module
from tf_dist.data.rows import Examples
from tf_dist.errors import DataError
from tf_dist.training.trainer import Trainer

V, T = 11, 8


class Bigram(keras.Model):
    """A subclass, which has no ``output_shape``."""

    def __init__(self, rows=V):
        super().__init__()
        self.table = layers.Embedding(rows, V)

    def call(self, x):
        return self.table(x)


class Secretive(Bigram):
    """One that only a real call can tell of."""

    def compute_output_spec(self, *args, **kwargs):
        raise NotImplementedError


def functional():
    return keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, V)])


def trainer_of(model):
    model(np.zeros((1, T), np.int32))
    return Trainer(
        model,
        keras.optimizers.SGD(1.0),
        SerialComm(),
        clip_norm=0.0,
        global_batch_size=4,
        seq_len=T,
        autotune="off",
    )


def text(*foreign):
    tokens = np.random.default_rng(1).integers(0, V, 400)
    tokens[[77] * len(foreign)] = foreign
    return tokens


@pytest.mark.parametrize("make", [functional, Bigram])
@pytest.mark.parametrize("foreign", [V, -2, 1 << 40])
def test_refused_before_the_first_step(make, foreign):
    trainer = trainer_of(make())
    before = [variable.numpy() for variable in trainer.model.weights]
    said = f"token id {foreign} at place 77 is not in the model's vocabulary of {V} "
    with pytest.raises(DataError, match=said):
        trainer.fit(text(foreign), steps=2)
    with pytest.raises(DataError, match=said):
        trainer.fit(text(), steps=2, validation=text(foreign), eval_every=1)
    with pytest.raises(DataError, match=said):
        trainer.validate(text(foreign))
    assert trainer.step == 0
    assert all((was == now.numpy()).all() for was, now in zip(before, trainer.model.weights, strict=True))


@pytest.mark.parametrize("make", [functional, Bigram, Secretive])
def test_tokens_of_the_model_are_trained_on(make):
    trainer = trainer_of(make())
    trainer.fit(text(), steps=2, validation=text(), eval_every=1)
    assert trainer.step == 2


@pytest.mark.parametrize("model", [Secretive(), Bigram(V - 3)], ids=["unknown", "short table"])
def test_met_by_a_step_it_is_one_line(model):
    trainer = trainer_of(model)
    tokens = text(V) if isinstance(model, Secretive) else text()
    with pytest.raises(DataError, match=r"token id \d+ is not in the model's vocabulary of \d+ ") as caught:
        trainer.fit(tokens, steps=20)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="is not in the model's vocabulary"):
        trainer.validate(tokens)


def test_met_between_the_samples_of_a_large_text(monkeypatch):
    monkeypatch.setattr(tokens_module, "SAMPLED_FROM_BYTES", 100)
    monkeypatch.setattr(tokens_module, "SAMPLED_BLOCK_TOKENS", 4)
    monkeypatch.setattr(tokens_module, "SAMPLED_BLOCKS", 3)
    with pytest.raises(DataError, match="token id 11 at place 77 "):
        trainer_of(functional()).fit(text(V), steps=20)


@pytest.mark.parametrize(("words", "targets"), [(T + 1, T), (T, T + 1), (T, 1), (1, T)])
def test_rows_of_another_shape_are_refused_before_the_first_step(words, targets):
    rows = Examples(np.zeros(8 * (words + targets), np.int32), words, targets)
    said = f"rows of {words} tokens and {targets} targets do not fit this model, which takes {T} and"
    with pytest.raises(DataError, match=said):
        trainer_of(functional()).fit(rows, steps=1)


def test_rows_of_its_shape_are_trained_on():
    """As windows of the same tokens are."""
    sequences = trainer_of(functional()).sequences(text())
    x, y = sequences.rows(np.arange(8))
    rows = Examples(np.concatenate([x, y], axis=1).astype(np.int32).reshape(-1), T, T)
    windows = trainer_of(functional()).sequences(text()[: 8 * T + 1])
    losses = []
    for given in (rows, windows):
        keras.utils.set_random_seed(1)
        losses.append(trainer_of(functional()).fit(given, steps=2)["loss"])
    assert losses[0] == losses[1]
