"""Layers whose work ranks share, ranks as threads, each call at once: against the whole layer.

Legend: R ranks, B rows, T tokens, D width.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.thread_comm import on_ranks
from tf_dist.errors import UsageError
from tf_dist.layers import (
    ColumnParallelDense,
    ParallelLSTM,
    ParallelSelfAttention,
    RowParallelDense,
    VocabularyParallelEmbedding,
    mappings,
)
from tf_dist.layers.cross_entropy import cross_entropy
from tf_dist.models.fast_lstm import LSTM
from tf_dist.models.model_outputs import LossTerms
from tf_dist.models.transformer import CausalSelfAttention
from tf_dist.parallel.sharding import part_of
from tf_dist.partition import share

B, T, D = 2, 5, 12
RANKS = [1, 2, 3]
IDS = np.random.default_rng(9).integers(0, 11, (B, T)).astype(np.int32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outputs_and_gradients(layer, x, dy):
    """What a layer returns; the gradients of its weights and of its input."""
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        loss = tf.reduce_sum(y * dy(y))
    wanted = [*(variable.value for variable in layer.trainable_variables), x]
    return np.asarray(y), [
        None if g is None else np.asarray(tf.convert_to_tensor(g)) for g in tape.gradient(loss, wanted)
    ]


def upstream(y):
    return normal(*y.shape, seed=7)


def same_on_all(size, make_whole, make_own, x, close=1e-5):
    """Compare a layer that ``make_own(comm)`` makes on each of ``size`` ranks with ``make_whole()``."""
    whole = make_whole()
    y, gradients = outputs_and_gradients(whole, x, upstream)
    weights = [normal(*variable.shape, seed=i) for i, variable in enumerate(whole.trainable_variables)]
    for variable, value in zip(whole.trainable_variables, weights, strict=True):
        variable.assign(value)
    y, gradients = outputs_and_gradients(whole, x, upstream)

    def on_rank(comm):
        own = make_own(comm)
        own(x)
        parts = [part_of(variable) for variable in own.trainable_variables]
        for variable, part, value in zip(own.trainable_variables, parts, weights, strict=True):
            variable.assign(part.take(value))
        return parts, *outputs_and_gradients(own, x, upstream)

    outcomes = on_ranks(size, on_rank)
    for outcome in outcomes:
        assert not isinstance(outcome, Exception), outcome
        parts, own_y, own_gradients = outcome
        np.testing.assert_allclose(own_y, y, rtol=close, atol=close)
        for part, own, theirs in zip([*parts, None], own_gradients, gradients, strict=True):
            if theirs is None:
                assert own is None
                continue
            expected = theirs if part is None else part.take(theirs)
            np.testing.assert_allclose(own, expected, rtol=close, atol=close * np.abs(theirs).max())
    # What every rank holds must have the same bits on all.
    for i, part in enumerate(outcomes[0][0]):
        if part.ranges is None:
            assert len({outcome[2][i].tobytes() for outcome in outcomes}) == 1
    assert len({outcome[1].tobytes() for outcome in outcomes}) == 1


@pytest.mark.parametrize("size", RANKS)
def test_columns_that_are_gathered(size):
    options = {"activation": "tanh", "name": "columns"}
    same_on_all(
        size,
        lambda: keras.layers.Dense(7, **options),
        lambda comm: ColumnParallelDense(7, comm, gather_output=True, **options),
        normal(B, T, D),
    )


@pytest.mark.parametrize("size", RANKS)
def test_columns_then_rows(size):
    def whole():
        return keras.Sequential([keras.layers.Dense(8, activation="gelu"), keras.layers.Dense(3)])

    def own(comm):
        return keras.Sequential(
            [
                ColumnParallelDense(8, comm, activation="gelu"),
                RowParallelDense(3, comm, input_width=8),
            ]
        )

    same_on_all(size, whole, own, normal(B, T, D))


@pytest.mark.parametrize("size", RANKS)
def test_heads(size):
    same_on_all(
        size,
        lambda: CausalSelfAttention(6, 0.0, 0.02),
        lambda comm: ParallelSelfAttention(6, 0.0, 0.02, comm=comm),
        normal(B, T, D),
    )


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize(
    "options", [{"return_sequences": True}, {}, {"return_sequences": True, "use_bias": False}]
)
def test_units(size, options):
    same_on_all(
        size, lambda: LSTM(7, **options), lambda comm: ParallelLSTM(7, comm, **options), normal(B, T, D)
    )


def test_states_and_masks():
    mask = np.array([[True, True, False, True, False], [False, True, True, True, True]])
    x, states = normal(B, T, D), [normal(B, 7, seed=1), normal(B, 7, seed=2)]
    options = {"return_sequences": True, "return_state": True}
    whole = LSTM(7, **options)
    expected = whole(x, initial_state=states, mask=mask)

    def on_rank(comm):
        own = ParallelLSTM(7, comm, **options)
        own.build(x.shape)
        for mine, theirs in zip(own.trainable_variables, whole.trainable_variables, strict=True):
            mine.assign(part_of(mine).take(theirs.numpy()))
        return own(x, initial_state=states, mask=mask)

    for outcome in on_ranks(2, on_rank):
        for own, theirs in zip(outcome, expected, strict=True):
            np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-6)


class Lookup(keras.layers.Layer):
    """An embedding of `IDS`, and in reverse, so that its input is what is differentiated."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def build(self, input_shape):
        self.embedding.build()

    def call(self, x):
        return self.embedding(x + self.embedding(IDS), reverse=True)


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary(size, tied):
    options = {"tie_weights": tied}
    same_on_all(
        size,
        lambda: Lookup(keras.layers.ReversibleEmbedding(11, D, **options)),
        lambda comm: Lookup(VocabularyParallelEmbedding(11, D, comm, **options)),
        normal(B, T, D),
    )


@pytest.mark.parametrize("terms", [LossTerms(), LossTerms(0.1), LossTerms(0.2, 1e-2)])
@pytest.mark.parametrize("size", RANKS)
def test_cross_entropy(size, terms):
    logits = 3 * normal(6, 11)
    logits[1, 4] = logits[1, 9] = logits[1].max() + 1  # shared by two ranks, as the highest
    logits[2] += 500  # whose exponential is infinite
    y = np.array([0, 4, 5, 9, 10, 10], np.int32)
    smooth = (1 - terms.label_smoothing) * tf.one_hot(y, 11) + terms.label_smoothing / 11
    with tf.GradientTape() as tape:
        whole = tf.constant(logits)
        tape.watch(whole)
        losses = tf.nn.softmax_cross_entropy_with_logits(smooth, whole)
        losses += terms.z_loss * tf.square(tf.reduce_logsumexp(whole, -1))
    gradients = tape.gradient(losses, whole)

    def on_rank(comm):
        parts = [share(11, rank, comm.size) for rank in range(comm.size)]
        part = parts[comm.rank]
        own = tf.constant(logits[:, part.start : part.stop])
        return part, *(np.asarray(a) for a in cross_entropy(comm, own, tf.constant(y), parts, terms))

    outcomes = on_ranks(size, on_rank)
    for part, own_losses, own_gradients, right in outcomes:
        np.testing.assert_allclose(own_losses, losses, rtol=1e-5, atol=1e-5)
        wanted = gradients.numpy()[:, part.start : part.stop]
        np.testing.assert_allclose(own_gradients, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(right, logits.argmax(1) == y)
    assert len({losses.tobytes() for _, losses, _, _ in outcomes}) == 1


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_collectives_keep_the_type(name):
    def on_rank(comm):
        x = tf.cast(tf.range(6), name) + tf.cast(comm.rank, name)
        parts = [range(0, 2), range(2, 6)]
        own = mappings.own_part(comm, tf.cast(tf.range(6), name), parts)
        return (
            mappings.summed(comm, x),
            mappings.gathered(comm, own, parts),
            mappings.stacked(comm, x),
        )

    for summed, gathered, stacked in on_ranks(2, on_rank):
        assert summed.dtype == gathered.dtype == stacked.dtype == name
        np.testing.assert_array_equal(tf.cast(summed, tf.int32), 2 * np.arange(6) + 1)
        np.testing.assert_array_equal(tf.cast(gathered, tf.int32), np.arange(6))
        np.testing.assert_array_equal(tf.cast(stacked, tf.int32), [np.arange(6), np.arange(6) + 1])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda comm: ColumnParallelDense(1, comm, name="d"), "d: 1 units cannot be divided among 2 ranks"),
        (lambda comm: ColumnParallelDense(8, comm, groups=3, name="d"), "3 groups do not divide 8 units"),
        (lambda comm: ColumnParallelDense(6, comm, groups=3, gather_output=True), "outputs of one group"),
        (lambda comm: RowParallelDense(3, comm, input_width=8).build((None, 5)), "has 4, not 5"),
        (
            lambda comm: ParallelSelfAttention(3, 0.0, 0.02, comm=comm),
            "does not divide heads 3 (3 = 1 x 2 + 1)",
        ),
        (lambda comm: ParallelLSTM(4, comm, recurrent_dropout=0.1), "recurrent_dropout is not supported"),
        (lambda comm: ParallelLSTM(4, comm, activation="relu")(normal(B, T, D)), "tanh and sigmoid"),
        (lambda comm: VocabularyParallelEmbedding(1, 4, comm), "1 tokens cannot be divided among 2 ranks"),
        (lambda comm: VocabularyParallelEmbedding(9, 4, comm, mask_zero=True), "mask_zero is not supported"),
        (
            lambda comm: ColumnParallelDense(4, comm, kernel_constraint="non_neg", name="d").build((None, 3)),
            "d/kernel is divided among ranks, so a constraint",
        ),
    ],
)
def test_what_cannot_be_divided(make, text):
    for outcome in on_ranks(2, make):
        assert isinstance(outcome, UsageError)
        assert text in str(outcome)
