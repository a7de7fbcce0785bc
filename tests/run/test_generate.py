"""Choosing the next token, and feeding it back."""

import logging

import keras
import numpy as np
import pytest

from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.models.build import build
from tf_dist.run.generate import Sampling, choose, continuation, generate
from tf_dist.runners.decoding_forward import window_forward_of_model

V, T = 11, 4


@pytest.fixture(scope="module")
def successor():
    """A model whose likeliest next token is always the one after this, modulo V."""
    tokens = keras.Input((T,), dtype="int32")
    table = np.full((V, V), -5.0, np.float32)
    table[np.arange(V), (np.arange(V) + 1) % V] = 5.0
    constant = keras.initializers.Constant(table)
    return keras.Model(tokens, keras.layers.Embedding(V, V, embeddings_initializer=constant)(tokens))


def test_greedy_text_follows_the_model_beyond_its_window(successor):
    made = list(generate(successor, T, np.array([3]), 3 * T, Sampling(temperature=0)))
    assert made == [(4 + i) % V for i in range(3 * T)]


def test_a_prompt_longer_than_the_window(successor):
    assert list(generate(successor, T, np.arange(2 * T), 1, Sampling(temperature=0))) == [2 * T]


def test_an_empty_prompt_is_refused(successor):
    with pytest.raises(UsageError, match="prompt is empty"):
        next(generate(successor, T, np.array([], int), 1, Sampling()))


def drawn(logits, count=4000, **how):
    random = np.random.default_rng(0)
    return np.bincount([choose(np.log(logits), Sampling(**how), random) for _ in range(count)], minlength=4)


def test_frequencies_are_the_probabilities():
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    assert np.abs(drawn(probabilities, temperature=1.0) / 4000 - probabilities).max() < 0.03


def test_temperature_sharpens():
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    squared = probabilities**2 / (probabilities**2).sum()
    assert np.abs(drawn(probabilities, temperature=0.5) / 4000 - squared).max() < 0.03


def test_top_k_and_top_p_leave_the_rest_out():
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    assert (drawn(probabilities, top_k=2) > 0).tolist() == [False, False, True, True]
    # 0.4 + 0.3 reaches 0.5 with its second token, which belongs to the nucleus.
    assert (drawn(probabilities, temperature=1.0, top_p=0.5) > 0).tolist() == [False, False, True, True]
    assert (drawn(probabilities, top_p=1e-9) > 0).tolist() == [False, False, False, True]


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}])
def test_values_out_of_range(values):
    with pytest.raises(UsageError):
        Sampling(**values)


@pytest.mark.parametrize("model", ["transformer", "lstm"])
def test_greedy_and_drawn_text_are_those_without_a_cache(model):
    """Of a trained model, up to its window; a Transformer's also beyond it."""
    config = Config(vocab_size=V, seq_len=16, width=16, heads=2, layers=2, model=model)
    trained = build(config)
    trained.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    text = np.tile((np.arange(V) * 3 + 1) % V, 40)
    x_BxT = np.stack([text[i : i + 16] for i in range(200)])
    y_BxT = np.stack([text[i + 1 : i + 17] for i in range(200)])
    trained.fit(x_BxT, y_BxT, epochs=3, batch_size=20, verbose=0)
    count = 40 if model == "transformer" else 13
    plain = window_forward_of_model(trained, 16)
    for sampling in (Sampling(temperature=0), Sampling(seed=3), Sampling(1.5, top_k=5, seed=4)):
        for prompt in ([1], [4, 2, 7]):
            found = list(generate(trained, 16, np.array(prompt), count, sampling))
            assert found == list(continuation(plain, np.array(prompt), count, sampling))


def test_a_model_that_is_not_known_is_said_once_and_works(caplog):
    class Own(keras.layers.Layer):
        def call(self, x):
            return x * 2.0

    log = logging.getLogger("tf_dist")
    log.addHandler(caplog.handler)
    tokens = keras.Input((T,), dtype="int32")
    model = keras.Model(tokens, Own(name="mine")(keras.layers.Embedding(V, V)(tokens)))
    made = list(generate(model, T, np.array([3]), 2 * T, Sampling(temperature=0)))
    log.removeHandler(caplog.handler)
    table = model.layers[1].get_weights()[0]
    expected = [int(table[token].argmax()) for token in [3, *made[:-1]]]
    assert made == expected
    assert caplog.text.count("layer 'mine' (Own) does not say") == 1
