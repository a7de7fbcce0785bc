"""Models on new positions only: the numbers of the whole window, whatever is asked at once."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from strong_weights import strong

from tf_dist.config import Config
from tf_dist.models.build import build
from tf_dist.models.fast_lstm import LSTM
from tf_dist.models.incremental import IncrementalModel, NotIncremental
from tf_dist.models.transformer import CausalSelfAttention, LearnedPositions
from tf_dist.runners.cached_forward import CachedModel

B, T, V, D = 3, 16, 23, 24
IDS = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.06}


def made(**values):
    return strong(build(Config(vocab_size=V, seq_len=T, width=D, heads=4, layers=2, **values)))


@pytest.fixture(scope="module", params=["transformer", "lstm"])
def kind(request):
    return request.param


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_window(kind, precision, tied):
    """Prompts of different lengths at once, and then token by token."""
    model = made(model=kind, precision=precision, tie_embeddings=tied)
    whole_BxTxV = np.asarray(tf.cast(model(IDS), tf.float32))
    forward = CachedModel(model, T)
    read_B, worst = np.array([5, 1, 8], np.int32), 0.0
    state = forward.begin(B, T)
    logits_BxV, state = forward(IDS[:, :8], np.zeros(B, np.int32), read_B, state)
    for _ in range(T - 8):
        worst = max(worst, np.abs(logits_BxV - whole_BxTxV[np.arange(B), read_B - 1]).max())
        x_Bx1 = IDS[np.arange(B), read_B][:, None]
        logits_BxV, state = forward(x_Bx1, read_B, np.ones(B, np.int32), state)
        read_B = read_B + 1
    worst = max(worst, np.abs(logits_BxV - whole_BxTxV[np.arange(B), read_B - 1]).max())
    assert worst < TOLERANCE[precision] * np.abs(whole_BxTxV).max()
    assert forward.segment.traces == 2  # of the prompts, and of one token


def test_what_is_padding_does_not_matter(kind):
    forward = CachedModel(made(model=kind), T)
    given = np.zeros(B, np.int32), np.array([3, 8, 5], np.int32)
    other = IDS[:, :8].copy()
    other[0, 3:], other[2, 5:] = 1, 2
    found, state = forward(IDS[:, :8], *given, forward.begin(B, T))
    again, others = forward(other, *given, forward.begin(B, T))
    np.testing.assert_array_equal(found, again)
    following = (IDS[:, 8:9], given[1], np.ones(B, np.int32))
    np.testing.assert_array_equal(forward(*following, state)[0], forward(*following, others)[0])


def test_several_positions_behind_others(kind):
    """As a prompt that comes in pieces; a row may have no more of it."""
    model = made(model=kind)
    whole_BxTxV = np.asarray(model(IDS))
    forward = CachedModel(model, T)
    count_B, start_B = np.array([4, 4, 2], np.int32), np.array([4, 4, 4], np.int32)
    _, state = forward(IDS[:, :4], np.zeros(B, np.int32), start_B, forward.begin(B, T))
    logits_BxV, state = forward(IDS[:, 4:8], start_B, count_B, state)
    np.testing.assert_allclose(logits_BxV, whole_BxTxV[np.arange(B), 3 + count_B], atol=1e-5)
    count_B = np.array([1, 0, 1], np.int32)
    x_Bx2 = np.stack([IDS[0, 8:10], IDS[1, 8:10], IDS[2, 6:8]])
    _, state = forward(x_Bx2, np.array([8, 8, 6], np.int32), count_B, state)
    read_B = np.array([9, 8, 7], np.int32)
    logits_BxV, _ = forward(IDS[np.arange(B), read_B][:, None], read_B, np.ones(B, np.int32), state)
    np.testing.assert_allclose(logits_BxV, whole_BxTxV[np.arange(B), read_B], atol=1e-5)


def test_rows_can_be_chosen(kind):
    forward = CachedModel(made(model=kind), T)
    all_of = np.full(B, 8, np.int32)
    _, state = forward(IDS[:, :8], np.zeros(B, np.int32), all_of, forward.begin(B, T))
    rows = np.array([2, 0, 0, 1])
    chosen = forward.select(state, rows)
    found, _ = forward(IDS[:, 8:9], all_of, np.ones(B, np.int32), state)
    again, _ = forward(IDS[rows, 8:9], all_of[rows - 3], np.ones(4, np.int32), chosen)
    np.testing.assert_allclose(again, found[rows], atol=1e-5)


def test_only_a_model_with_positions_has_a_limit():
    assert CachedModel(made(), T).limit == T
    assert CachedModel(made(model="lstm"), T).limit is None


def of(*layers, tokens=(T,)):
    """A model of these layers between an embedding and logits."""
    x = given = keras.Input(tokens, dtype="int32")
    for layer in [keras.layers.Embedding(V, D), *layers, keras.layers.Dense(V)]:
        x = layer(x)
    return strong(keras.Model(given, x))


def test_a_user_s_model_of_known_layers():
    given = keras.Input((T,), dtype="int32")
    x = keras.layers.Embedding(V, D)(given)
    x = x + keras.layers.Dense(D, "relu")(LearnedPositions()(x))
    x = keras.Sequential([keras.Input((T, D)), LSTM(D, return_sequences=True), keras.layers.Dropout(0.5)])(x)
    x = keras.layers.Concatenate()([x, CausalSelfAttention(2, 0.1, 0.02)(x)]) * 0.5
    model = strong(keras.Model(given, keras.layers.Dense(V)(keras.layers.LayerNormalization()(x))))
    forward, whole_BxTxV = CachedModel(model, T), np.asarray(model(IDS))
    five = np.full(B, 5, np.int32)
    logits_BxV, state = forward(IDS[:, :5], np.zeros(B, np.int32), five, forward.begin(B, T))
    np.testing.assert_allclose(logits_BxV, whole_BxTxV[:, 4], atol=1e-5)
    logits_BxV, _ = forward(IDS[:, 5:6], five, np.ones(B, np.int32), state)
    np.testing.assert_allclose(logits_BxV, whole_BxTxV[:, 5], atol=1e-5)


@pytest.mark.parametrize("recurrent", ["GRU", "LSTM", "SimpleRNN"])
def test_keras_s_own_recurrent_layers(recurrent):
    """Also where a row has fewer new positions than others."""
    model = of(getattr(keras.layers, recurrent)(D, return_sequences=True), keras.layers.Dropout(0.5))
    forward, whole_BxTxV = CachedModel(model, T), np.asarray(model(IDS))
    assert forward.limit is None
    read_B = np.array([5, 1, 3], np.int32)
    logits_BxV, state = forward(IDS[:, :5], np.zeros(B, np.int32), read_B, forward.begin(B, T))
    np.testing.assert_allclose(logits_BxV, whole_BxTxV[np.arange(B), read_B - 1], atol=1e-5)
    logits_BxV, _ = forward(IDS[np.arange(B), read_B][:, None], read_B, np.ones(B, np.int32), state)
    np.testing.assert_allclose(logits_BxV, whole_BxTxV[np.arange(B), read_B], atol=1e-5)


class LookingAhead(CausalSelfAttention):
    """A subclass that computes something else, and says nothing of new positions."""

    def call(self, x_BxTxD, training=False):
        return super().call(x_BxTxD[:, ::-1])


class MyDense(keras.layers.Dense):
    def call(self, inputs):
        return super().call(inputs - keras.ops.mean(inputs, axis=1, keepdims=True))


def unknown():
    x = keras.Input((T,), dtype="int32")
    constant = keras.layers.Embedding(V, D)(x) + np.ones((T, D), np.float32)
    return {
        "GlobalAveragePooling1D": [keras.layers.GlobalAveragePooling1D(), keras.layers.RepeatVector(T)],
        "LookingAhead": [LookingAhead(2, 0.0, 0.02)],
        "MyDense": [MyDense(D)],
        "Conv1D": [keras.layers.Conv1D(D, 3, padding="causal")],
        "LayerNormalization": [keras.layers.LayerNormalization(axis=[1, 2])],
        "Softmax": [keras.layers.Softmax(axis=1)],
        "LSTM": [LSTM(D, return_sequences=True, go_backwards=True)],
        "Add": keras.Model(x, constant),
        "Embedding": keras.Sequential(
            [keras.Input((T,), dtype="int32"), keras.layers.Embedding(V, V, mask_zero=True)]
        ),
    }


@pytest.mark.parametrize("name", unknown())
def test_what_is_not_known_is_refused_by_name(name):
    made = unknown()[name]
    with pytest.raises(NotIncremental, match=rf"\({name}\) does not say"):
        IncrementalModel(of(*made) if isinstance(made, list) else made)


def test_a_subclassed_model_is_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(NotIncremental, match="Own, whose layers are unknown"):
        IncrementalModel(Own())


class Source(keras.layers.Layer):
    """The first S positions, a stream of their own: there are none after the first call."""

    bounded, S = True, 4

    def call(self, x):
        return x[:, : self.S]

    def begin(self, batch, length):
        return ()

    def step(self, x, *, cache, span):
        return (x[:, : self.S] if x.shape[1] > self.S else None), cache


class Target(Source):
    """The others, with positions counted from their first."""

    def call(self, x):
        return x[:, self.S :]

    def step(self, x, *, cache, span):
        first = x.shape[1] > self.S
        start = span.start_B * 0 if first else span.start_B - self.S
        count = span.count_B - self.S if first else span.count_B
        return (x[:, self.S :] if first else x), cache, span._replace(start_B=start, count_B=count)


class AddMean(keras.layers.Layer):
    """Adds the mean of a source, as a layer with attention to it would its own sum; it keeps the source."""

    bounded = True

    def call(self, x, source):
        return x + keras.ops.mean(source, axis=1, keepdims=True)

    def begin(self, batch, length):
        return tf.zeros((batch, 1, D))

    def step(self, x, source=None, *, cache, span):
        mean = cache if source is None else keras.ops.mean(source, axis=1, keepdims=True)
        return x + mean, mean


def test_two_streams_as_of_an_encoder_and_a_decoder():
    given = keras.Input((T,), dtype="int32")
    x = keras.layers.Embedding(V, D)(given)
    source = keras.layers.Dense(D)(Source()(x))
    target = CausalSelfAttention(2, 0.0, 0.02)(LearnedPositions()(Target()(x)))
    model = strong(keras.Model(given, keras.layers.Dense(V)(AddMean()(target, source))))
    whole_BxUxV = np.asarray(model(IDS))
    forward = CachedModel(model, T)
    read_B = np.array([7, 6, 5], np.int32)
    logits_BxV, state = forward(IDS[:, :8], np.zeros(B, np.int32), read_B, forward.begin(B, T))
    for _ in range(4):
        expected = whole_BxUxV[np.arange(B), read_B - 1 - Source.S]
        np.testing.assert_allclose(logits_BxV, expected, atol=2e-5)
        x_Bx1 = IDS[np.arange(B), read_B][:, None]
        logits_BxV, state = forward(x_Bx1, read_B, np.ones(B, np.int32), state)
        read_B = read_B + 1
