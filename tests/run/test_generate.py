"""Choosing the next token, and feeding it back."""

import keras
import numpy as np
import pytest

from tf_dist.errors import UsageError
from tf_dist.run.generate import Sampling, choose, generate

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
