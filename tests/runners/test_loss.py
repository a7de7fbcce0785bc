"""Legend: B rows, T tokens, D width, V vocabulary, N = B T."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dist.config import Config
from tf_dist.models.build import build
from tf_dist.models.lm_head import head_of
from tf_dist.runners import loss
from tf_dist.runners.replica import Replica

B, T, V, D = 3, 8, 50, 16
SIZES = {"vocab_size": V, "seq_len": T, "width": D, "layers": 1, "heads": 2}


@pytest.fixture
def chunked(monkeypatch):
    """``chunked(C)``: from now on the loss of our models comes in C chunks; 24 tokens are 5 x 5 less one."""

    def set_chunks(count, vocab_size=V):
        monkeypatch.setattr(loss, "CHUNKED_FROM", 1)
        monkeypatch.setattr(loss, "CHUNK", -(-B * T // count) * vocab_size)

    return set_chunks


def batch(seed=0):
    random = np.random.default_rng(seed)
    x, y = (random.integers(0, V, (B, T)).astype(np.int32) for _ in range(2))
    y[0, 3:] = y[2] = loss.IGNORED
    return x, y


def made(name="transformer", **values):
    model = build(Config(model=name, **{**SIZES, **values}))
    for i, variable in enumerate(model.trainable_variables):
        noise = np.random.default_rng(i).standard_normal(variable.shape)
        variable.assign(variable + 0.3 * noise.astype(np.float32))
    return model


def both_of(model):
    """The gradient and sums of a batch, and the sums without a gradient."""
    replica = Replica(model, keras.optimizers.SGD(0.1), B, T, 1)
    gradient, sums = replica.gradients(*batch(), (0, 0))
    return gradient.copy(), sums, replica.evaluate(*batch())


@pytest.mark.parametrize(
    "count",
    [pytest.param(1, marks=pytest.mark.extended), pytest.param(3, marks=pytest.mark.extended), 5, B * T],
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_chunks_change_nothing(chunked, name, tied, count):
    model = made(name, tie_embeddings=tied, dropout=0.2)
    gradient, sums, evaluated = both_of(model)
    chunked(count)
    in_chunks, sums_in_chunks, evaluated_in_chunks = both_of(model)
    np.testing.assert_allclose(in_chunks, gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())
    np.testing.assert_allclose(sums_in_chunks, sums, rtol=1e-6)
    np.testing.assert_allclose(evaluated_in_chunks, evaluated, rtol=1e-6)
    assert sums[1] == (B - 1) * T - 5


def test_chunks_in_bfloat16(chunked):
    """Summed in float32: as near to float32 as whole logits are, but for the rounding of the logits."""
    exact, _, _ = both_of(made())
    model = made(precision="bfloat16")
    whole, sums, _ = both_of(model)
    chunked(5)
    in_chunks, sums_in_chunks, _ = both_of(model)
    assert in_chunks.dtype == np.float32
    np.testing.assert_allclose(sums_in_chunks[0], sums[0], rtol=1e-2)
    errors = [np.linalg.norm(found - exact) / np.linalg.norm(exact) for found in (whole, in_chunks)]
    assert errors[1] < 2 * errors[0] < 0.1


def test_padding_may_hold_anything(chunked):
    """States that are not finite, in places that are not counted, reach no sum and no gradient."""
    chunked(5)
    states, table = tf.random.normal((B, T, D), seed=1), tf.random.normal((V, D), seed=2)
    _, y = batch()
    broken = tf.where((y == loss.IGNORED)[:, :, None], np.inf, states)
    for values in (states, broken):
        with tf.GradientTape() as tape:
            tape.watch([values, table])
            total, sums = loss._from_states(values, table, y, training=True)
        results = [sums, *tape.gradient(total, [values, table])]
        assert all(np.isfinite(result).all() for result in results)
    np.testing.assert_array_equal(results[1][y == loss.IGNORED], 0)


def sizes_of(function):
    """The number of elements of every tensor in a traced function, bodies of loops included."""
    graph = function.graph.as_graph_def(add_shapes=True)
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
    return {int(np.prod([dim.size for dim in shape.dim])) for shape in shapes}


def test_no_array_of_all_logits(chunked):
    """From the graph: with chunks, nothing is as large as the logits."""
    sizes = {**SIZES, "vocab_size": 301}
    model = build(Config(**sizes))
    for asked in (False, True):
        if asked:
            chunked(6, 301)
        replica = Replica(model, keras.optimizers.SGD(0.1), B, T, 1)
        found = sizes_of(replica._gradients[False].get_concrete_function())
        assert (B * T * 301 in found) == (not asked)
        assert (4 * 301 in found) == asked
    assert max(found) == replica.parameters


@pytest.mark.parametrize("training", [True, False])
def test_chunks_under_xla(chunked, training):
    chunked(5)
    model = made()
    x, y = batch()
    plain = loss.loss_and_sums(model, x, tf.constant(y), training)[1]
    compiled = tf.function(
        lambda x, y: loss.loss_and_sums(model, x, y, training)[1],
        jit_compile=True,
        input_signature=[tf.TensorSpec((B, T), tf.int32)] * 2,
    )
    np.testing.assert_allclose(compiled(x, y), plain, rtol=1e-5)


def test_only_large_logits_come_in_chunks(monkeypatch):
    called = []
    monkeypatch.setattr(loss, "_from_states", lambda *arguments: called.append(1) or (0.0, tf.zeros(3)))
    x, y = (tf.constant(a) for a in batch())
    loss.loss_and_sums(made(), x, y, training=True)
    monkeypatch.setattr(loss, "CHUNKED_FROM", B * T * V + 1)
    loss.loss_and_sums(made(), x, y, training=True)
    assert not called
    monkeypatch.setattr(loss, "CHUNKED_FROM", B * T * V)
    loss.loss_and_sums(made(), x, y, training=True)
    assert called


def test_a_model_of_somebody_else_has_no_head():
    tokens = keras.Input((T,), dtype="int32")
    assert head_of(keras.Model(tokens, keras.layers.Embedding(V, V)(tokens))) is None
    assert head_of(made()).vocab_size == V


def test_the_head_adds_no_variables():
    model = made()
    assert [v.path for v in model.weights] == [v.path for v in head_of(model).trunk.weights]
    assert len({id(v) for v in model.weights}) == len(model.weights) == 16
