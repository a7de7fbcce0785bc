"""Attention over ranks that share rows, ranks being threads, against that of one rank.

Legend: B rows, T tokens, H heads, K width of a head, s ranks.
"""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from thread_comm import on_ranks

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.layers.context_parallel import SharedPositions, sequence_parallel
from tf_dist.layers.ring_attention import RingAttention
from tf_dist.models import attention
from tf_dist.models.build import build
from tf_dist.models.transformer import PLAIN, LearnedPositions
from tf_dist.parallel.context_partition import columns
from tf_dist.parallel.cost_model import ring_bytes

B, H, K = 2, 3, 4


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_gradients(function, q, k, v, weights):
    """The value, and the gradient of a weighted sum of it for each input."""
    with tf.GradientTape() as tape:
        tape.watch([q, k, v])
        value = function(q, k, v)
        total = tf.reduce_sum(tf.cast(value, tf.float32) * tf.cast(weights, tf.float32))
    return [np.asarray(tf.cast(one, tf.float32)) for one in (value, *tape.gradient(total, [q, k, v]))]


def results(outcomes):
    """What ranks returned; raises what one raised."""
    for one in outcomes:
        if isinstance(one, Exception):
            raise one
    return outcomes


def on_a_ring(s, inputs, block):
    """`with_gradients` of whole rows, put together from what the ranks find for their tokens."""
    T = inputs[0].shape[2]

    def work(comm):
        mine = columns(T, comm.rank, s)
        return with_gradients(RingAttention(comm, block), *(tf.gather(one, mine, axis=2) for one in inputs))

    whole = [np.full(inputs[0].shape, np.nan, np.float32) for _ in range(4)]
    for rank, found in enumerate(results(on_ranks(s, work))):
        for all_of_it, part in zip(whole, found, strict=True):
            all_of_it[:, :, columns(T, rank, s)] = part
    return whole


def worst(found, expected):
    """The largest error of each array, in units of its largest value."""
    return [np.abs(a - b).max() / max(1, np.abs(b).max()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("block", [3, 4, 256])
@pytest.mark.parametrize("each", [1, 2, 7, 8])
@pytest.mark.parametrize("s", [1, 2, 3, 4])
def test_it_is_the_attention_of_one_rank(s, each, block):
    inputs = [tf.constant(normal(B, H, s * each, K, seed=i)) for i in range(4)]
    expected = with_gradients(attention.plain_attention, *inputs)
    assert max(worst(on_a_ring(s, inputs, block), expected)) < 1e-5


def test_scores_of_all_sizes():
    """The largest score so far grows from block to block by more than float32 can raise e to."""
    T = 24
    q, k, v, weights = (normal(1, 1, T, K, seed=i) for i in range(4))
    k *= np.linspace(1, 300, T, dtype=np.float32)[:, None]
    inputs = [tf.constant(one) for one in (q, k, v, weights)]
    found = on_a_ring(3, inputs, 4)
    assert np.isfinite(found).all()
    assert max(worst(found, with_gradients(attention.plain_attention, *inputs))) < 1e-5


def test_bfloat16_is_as_near_as_on_one_rank():
    inputs = [tf.cast(normal(B, H, 24, K, seed=i), tf.bfloat16) for i in range(4)]
    exact = with_gradients(attention.plain_attention, *(tf.cast(one, tf.float32) for one in inputs))
    alone = worst(with_gradients(attention.plain_attention, *inputs), exact)
    for ranks in (2, 3, 4):
        found = worst(on_a_ring(ranks, inputs, 4), exact)
        assert all(0 < error < max(0.02, 2 * before) for error, before in zip(found, alone, strict=True))


def arrays_of(s, T, block):
    """The number of elements of every tensor in a rank's graph, forward and backward."""
    specs = [tf.TensorSpec((1, H, T // s, K), tf.float32)] * 4

    def work(comm):
        function = RingAttention(comm, block)
        graph = tf.function(lambda *inputs: gradients_graph(function, *inputs)).get_concrete_function(*specs)
        nodes = graph.graph.get_operations()
        return [output.shape.num_elements() or 0 for node in nodes for output in node.outputs]

    return [max(found) for found in results(on_ranks(s, work))]


def gradients_graph(function, q, k, v, weights):
    with tf.GradientTape() as tape:
        tape.watch([q, k, v])
        total = tf.reduce_sum(function(q, k, v) * weights)
    return tape.gradient(total, [q, k, v])


@pytest.mark.parametrize("s", [2, 4])
def test_nothing_of_all_tokens_is_on_a_rank(s):
    """The largest array is a block's weights for the keys of one rank."""
    block = 8
    for T in (64, 128):
        assert arrays_of(s, T, block) == [H * block * T // s] * s


@pytest.mark.parametrize("s", [2, 3, 4])
def test_each_rank_sends_what_the_formula_says(s):
    shape = (B, H, 4, K)

    def work(comm):
        before = comm.sent_bytes
        with_gradients(RingAttention(comm), *(tf.constant(normal(*shape, seed=i)) for i in range(4)))
        return comm.sent_bytes - before

    expected = ring_bytes(rows=B, seq_len=4 * s, width=H * K, layers=1, ranks=s)
    assert results(on_ranks(s, work)) == [expected] * s


# The layers around it ----------------------------------------------------------------------------


@pytest.mark.parametrize("s", [2, 3])
def test_positions_are_those_of_a_rank_s_tokens(s):
    T, D = 12, 5
    plain = LearnedPositions()
    plain.build((None, T, D))
    x, weights = normal(B, T, D), normal(B, T, D, seed=1)

    def added(layer, mine):
        with tf.GradientTape() as tape:
            y = layer(tf.constant(x[:, mine]))
            total = tf.reduce_sum(y * weights[:, mine])
        return np.asarray(y), np.asarray(tape.gradient(total, layer.trainable_variables[0].value))

    expected, gradient = added(plain, np.arange(T))
    together = np.zeros_like(gradient)
    for rank in range(s):
        layer = SharedPositions(T, rank, s)
        layer.build((None, T // s, D))
        layer.set_weights(plain.get_weights())
        mine = columns(T, rank, s)
        found, part = added(layer, mine)
        np.testing.assert_array_equal(found, expected[:, mine])
        assert not part[np.setdiff1d(np.arange(T), mine)].any()
        together += part
    np.testing.assert_allclose(together, gradient, rtol=1e-6)
    again = SharedPositions.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


def test_one_rank_has_the_plain_layers():
    assert sequence_parallel(SerialComm(), 7) is PLAIN


def test_ranks_must_divide_the_tokens():
    outcomes = on_ranks(2, lambda comm: sequence_parallel(comm, 9))
    assert all(isinstance(one, UsageError) for one in outcomes)
    assert "sequence_parallel 2 does not divide seq_len 9" in str(outcomes[0])


def test_first_weights_are_those_of_one_rank():
    config = Config(vocab_size=11, seq_len=12, width=8, layers=1, heads=2)
    whole = build(config)

    def work(comm):
        return sequence_parallel(comm, 12)

    for layers in results(on_ranks(2, work)):
        model = build(config, layers)
        assert model.input_shape == (None, 6)
        for a, b in zip(model.trainable_variables, whole.trainable_variables, strict=True):
            assert a.path == b.path
            np.testing.assert_array_equal(a, b)
        assert [layer.name for layer in model.layers if hasattr(layer, "tf_dist_talks")] == [
            "layer_0_attention"
        ]
        with pytest.raises(UsageError, match=r"dropout 0\.1 with rows that ranks share"):
            build(dataclasses.replace(config, dropout=0.1), layers)
