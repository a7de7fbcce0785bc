"""The Transformer's hand-written parts against the same arithmetic written plainly.

Legend: B rows, T tokens, D width, H heads, V vocabulary.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dist.models import attention, transformer
from tf_dist.models.fast_layers import LayerNormalization, gelu

B, T, D, H, V = 3, 16, 32, 4, 13


def normal(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).standard_normal(shape), tf.float32)


def with_gradients(function, *inputs):
    """The value, and the gradient of a weighted sum of it for each input."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = function(*inputs)
        total = tf.reduce_sum(tf.cast(value, tf.float32) * normal(*value.shape, seed=9))
    return value, *tape.gradient(total, inputs)


def assert_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


def plain_attention(q, k, v):
    scores = tf.einsum("bhsk,bhtk->bhst", q, k) / q.shape[-1] ** 0.5
    allowed = np.tril(np.ones((q.shape[2], q.shape[2]), bool))
    return tf.einsum("bhst,bhtk->bhsk", tf.nn.softmax(tf.where(allowed, scores, -np.inf)), v)


def plain_norm(x, gain, offset):
    mean, variance = tf.nn.moments(x, -1, keepdims=True)
    return (x - mean) / tf.sqrt(variance + 1e-5) * gain + offset


def plain_gelu(x):
    return x * 0.5 * tf.math.erfc(-x / 2**0.5)


def plain_transformer(tokens, variables, layers):
    """The model's logits from its trainable variables, in the order in which they are made."""
    take = iter(variables)
    table = next(take)
    x = tf.gather(table, tokens) + next(take)
    for _ in range(layers):
        h = plain_norm(x, next(take), next(take)) @ next(take) + next(take)
        q, k, v = (
            tf.transpose(tf.reshape(part, (-1, T, H, D // H)), (0, 2, 1, 3)) for part in tf.split(h, 3, -1)
        )
        h = tf.reshape(tf.transpose(plain_attention(q, k, v), (0, 2, 1, 3)), (-1, T, D))
        x += h @ next(take) + next(take)
        h = plain_gelu(plain_norm(x, next(take), next(take)) @ next(take) + next(take))
        x += h @ next(take) + next(take)
    return plain_norm(x, next(take), next(take)) @ tf.transpose(table)


@pytest.mark.parametrize("compiled", ["eager", "graph", "xla"])
def test_the_transformer(compiled):
    keras.utils.set_random_seed(1)
    model = transformer.build(V, T, 2, D, H)
    # Larger than at first: attention far from even, and gains and biases that count.
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(variable + 0.2 * normal(*variable.shape, seed=i))
    tokens = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
    values = [variable.value for variable in model.trainable_variables]

    def ours():
        with tf.GradientTape() as tape:
            logits = model(tokens, training=True)
            total = tf.reduce_sum(logits * normal(B, T, V, seed=9))
        return logits, *(tf.convert_to_tensor(g) for g in tape.gradient(total, values))

    def plainly(*variables):
        return plain_transformer(tokens, variables, 2)

    expected = with_gradients(plainly, *(tf.convert_to_tensor(value) for value in values))
    if compiled != "eager":
        ours = tf.function(ours, jit_compile=compiled == "xla")
    assert_close(ours(), [tf.convert_to_tensor(e) for e in expected])


def test_variables_are_those_of_earlier_checkpoints():
    """A checkpoint is read by place: names, shapes and their order must stay."""
    model = transformer.build(V, T, 1, D, H)
    layer = [
        ("layer_0_attention_norm/gamma", (D,)),
        ("layer_0_attention_norm/beta", (D,)),
        ("layer_0_attention/query_key_value/kernel", (D, 3 * D)),
        ("layer_0_attention/query_key_value/bias", (3 * D,)),
        ("layer_0_attention/output_projection/kernel", (D, D)),
        ("layer_0_attention/output_projection/bias", (D,)),
        ("layer_0_feed_forward_norm/gamma", (D,)),
        ("layer_0_feed_forward_norm/beta", (D,)),
        ("layer_0_feed_forward_in/kernel", (D, 4 * D)),
        ("layer_0_feed_forward_in/bias", (4 * D,)),
        ("layer_0_feed_forward_out/kernel", (4 * D, D)),
        ("layer_0_feed_forward_out/bias", (D,)),
    ]
    expected = [("embedding/embeddings", (V, D)), ("positions/positions", (T, D)), *layer]
    expected += [("final_norm/gamma", (D,)), ("final_norm/beta", (D,))]
    assert [(v.path, tuple(v.shape)) for v in model.trainable_variables] == expected


def test_heads_are_split_and_joined():
    qkv = normal(B, T, 3 * D)

    def plainly(qkv):
        parts = tf.reshape(qkv, (-1, T, 3, H, D // H))
        return tf.stack([tf.transpose(parts[:, :, i], (0, 2, 1, 3)) for i in range(3)])

    ours = with_gradients(lambda qkv: tf.stack(attention.split_heads(qkv, H)), qkv)
    assert_close(ours, with_gradients(plainly, qkv), 0)
    q, _, _ = attention.split_heads(qkv, H)
    np.testing.assert_array_equal(attention.join_heads(q), qkv[:, :, :D])


def test_attention():
    inputs = [normal(B, H, T, 8, seed=i) for i in range(3)]
    ours = with_gradients(attention.attention, *inputs)
    assert_close(ours, with_gradients(plain_attention, *inputs))
    undropped = with_gradients(lambda *qkv: attention.attention_with_dropout(*qkv, tf.identity), *inputs)
    assert_close(undropped, ours)


@pytest.mark.parametrize("compiled", ["eager", "graph", "xla"])
@pytest.mark.parametrize("block", [pytest.param(1, marks=pytest.mark.extended), 5, 8, 15, 16, 99])
def test_attention_in_blocks(block, compiled):
    inputs = [normal(B, H, T, 8, seed=i) for i in range(3)]

    def ours(*qkv):
        return with_gradients(lambda *qkv: attention.blockwise_attention(*qkv, block=block), *qkv)

    if compiled != "eager":
        ours = tf.function(ours, jit_compile=compiled == "xla")
    assert_close(ours(*inputs), with_gradients(plain_attention, *inputs))


def sizes_of(function, *shapes):
    """The number of elements of every tensor in the graph of a function and its gradients."""
    specs = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
    graph = tf.function(lambda *inputs: with_gradients(function, *inputs)).get_concrete_function(*specs).graph
    return [output.shape.num_elements() or 0 for node in graph.get_operations() for output in node.outputs]


def test_memory_of_blocks_grows_with_the_length():
    """The largest array there is, forward and backward, is one block's weights; the plain one's is T T."""
    block = 8
    for T in (32, 64, 128):
        shapes = [(1, H, T, 4)] * 3
        blockwise = sizes_of(lambda *qkv: attention.blockwise_attention(*qkv, block=block), *shapes)
        assert max(blockwise) == H * block * T
        assert max(sizes_of(attention.plain_attention, *shapes)) == H * T * T


def test_long_sequences_come_in_blocks(monkeypatch):
    inputs = [normal(B, H, T, 8, seed=i) for i in range(3)]
    expected = with_gradients(attention.attention, *inputs)
    monkeypatch.setattr(attention, "BLOCKWISE_FROM", T)
    monkeypatch.setattr(attention, "plain_attention", None)
    assert_close(with_gradients(attention.attention, *inputs), expected)


def test_layer_norm():
    x, gain, offset = normal(B, T, D) * 3 + 5, normal(D, seed=1), normal(D, seed=2)
    layer = LayerNormalization(epsilon=1e-5)
    layer.build(x.shape)

    def ours(x, gain, offset):
        with keras.StatelessScope([(layer.gamma, gain), (layer.beta, offset)]):
            return layer(x)

    assert_close(with_gradients(ours, x, gain, offset), with_gradients(plain_norm, x, gain, offset))


@pytest.mark.parametrize("options", [{"axis": 1}, {"scale": False}, {"axis": [1, 2]}])
def test_other_layer_norms_are_keras_s(options):
    x = normal(B, T, D)
    ours, keras_s = LayerNormalization(**options), keras.layers.LayerNormalization(**options)
    np.testing.assert_array_equal(ours(x), keras_s(x))


def test_gelu():
    x = tf.constant(np.linspace(-12, 12, 4001), tf.float32)
    assert_close(with_gradients(gelu, x), with_gradients(plain_gelu, x), 1e-6)
    assert_close([gelu(x)], [keras.activations.gelu(x)], 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_types_are_computed_in_float32(dtype):
    """Outputs are rounded once: they are those of float32, rounded."""
    x = tf.cast(normal(B, T, D), dtype)
    layer = LayerNormalization(epsilon=1e-5, dtype=f"mixed_{dtype}")
    exact = LayerNormalization(epsilon=1e-5)
    for ours, theirs in ((gelu(x), gelu(tf.cast(x, tf.float32))), (layer(x), exact(tf.cast(x, tf.float32)))):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, tf.cast(theirs, dtype))


def test_a_saved_transformer_loads(tmp_path):
    model = transformer.build(V, T, 1, D, H)
    model.save(tmp_path / "a.keras")
    again = keras.saving.load_model(tmp_path / "a.keras")
    tokens = np.arange(T)[None] % V
    np.testing.assert_array_equal(again(tokens), model(tokens))
