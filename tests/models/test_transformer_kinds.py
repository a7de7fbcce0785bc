"""What a Transformer is made of: each kind by its formula, in files, and on new positions only."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from strong_weights import strong

from tf_dist.config import Config
from tf_dist.config.rope_scaling import RopeScaling
from tf_dist.config.transformer import TransformerOptions
from tf_dist.errors import UsageError
from tf_dist.models import attention
from tf_dist.models.build import build
from tf_dist.models.fast_layers import LayerNormalization, RMSNormalization, rms_norm
from tf_dist.models.rotary import RotaryEmbedding
from tf_dist.runners.cached_forward import CachedModel

B, T, V, D = 3, 16, 23, 24
IDS = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
LLAMA = {"normalization": "rmsnorm", "activation": "swiglu", "position_embedding": "rope", "bias": "none"}
KINDS = {
    "llama": {**LLAMA, "kv_heads": 2, "tie_embeddings": False},
    "qwen": {**LLAMA, "kv_heads": 1, "qk_norm": True, "head_width": 8},
    "qwen2": {**LLAMA, "bias": "qkv"},
    "mistral": {**LLAMA, "kv_heads": 2, "sliding_window": 5},
    "stretched": {**LLAMA, "rope_scaling": "llama3:8:1:4:8", "activation": "geglu"},
    "bert": {"norm_order": "post", "activation": "gelu-tanh", "norm_epsilon": 1e-12},
    "bare": {"bias": "none", "activation": "relu", "position_embedding": "none", "ffn_width": 40},
}


def config(kind, **more):
    sizes = {"vocab_size": V, "seq_len": T, "width": D, "heads": 4, "layers": 2}
    return Config(**{**sizes, **KINDS[kind], **more})


@pytest.mark.parametrize("kind", KINDS)
def test_new_positions_have_the_logits_of_the_window(kind):
    model = strong(build(config(kind)))
    whole_BxTxV = np.asarray(model(IDS))
    forward = CachedModel(model, T)
    read_B, worst = np.array([5, 1, 8], np.int32), 0.0
    state = forward.begin(B, T)
    logits_BxV, state = forward(IDS[:, :8], np.zeros(B, np.int32), read_B, state)
    for _ in range(T - 8):
        worst = max(worst, np.abs(logits_BxV - whole_BxTxV[np.arange(B), read_B - 1]).max())
        logits_BxV, state = forward(IDS[np.arange(B), read_B][:, None], read_B, np.ones(B, np.int32), state)
        read_B = read_B + 1
    assert worst < 1e-5 * np.abs(whole_BxTxV).max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_sees_none_after_it_and_none_before_its_window(kind):
    model = strong(build(config(kind, layers=1)))
    at, window = 9, KINDS[kind].get("sliding_window", T)
    before = np.asarray(model(IDS))[:, at]
    for place in range(T):
        ids = IDS.copy()
        ids[:, place] = (ids[:, place] + 1) % V
        changed = np.abs(np.asarray(model(ids))[:, at] - before).max()
        assert (changed > 1e-6) == (at - window < place <= at), place


@pytest.mark.parametrize("kind", KINDS)
def test_its_files_have_its_layers(kind, tmp_path):
    model = strong(build(config(kind)))
    model.save(tmp_path / "model.keras")
    found = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.asarray(found(IDS)), np.asarray(model(IDS)))


def test_bfloat16_is_near():
    exact = strong(build(config("qwen")))
    short = build(config("qwen", precision="bfloat16"))
    for variable, value in zip(short.weights, exact.weights, strict=True):
        variable.assign(value)
    wanted = np.asarray(exact(IDS))
    assert np.abs(np.asarray(tf.cast(short(IDS), tf.float32)) - wanted).max() < 0.08 * np.abs(wanted).max()


def gradients_of(function, *arrays):
    tensors = [tf.constant(array) for array in arrays]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        result = function(*tensors)
        signs = tf.cos(tf.range(tf.size(result), dtype=tf.float32) * 0.7 + 1)
        loss = tf.reduce_sum(result * tf.reshape(signs, result.shape))
    return result, tape.gradient(loss, tensors)


def near(ours, theirs, tolerance=2e-6):
    for one, other in zip(keras.tree.flatten(ours), keras.tree.flatten(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * max(1, np.abs(other).max()), rtol=0)


def array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_norms_are_kerass():
    x, gain = array(2, 3, 8), array(8, seed=1)

    def plain(x, gain):
        return x * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + 1e-6) * gain

    near(gradients_of(lambda x, gain: rms_norm(x, gain, 1e-6), x, gain), gradients_of(plain, x, gain))
    ours, theirs = RMSNormalization(epsilon=1e-6), keras.layers.RMSNormalization(epsilon=1e-6)
    near(ours(x), theirs(x))
    ours, theirs = (kind(center=False) for kind in (LayerNormalization, keras.layers.LayerNormalization))
    near(ours(x), theirs(x))
    assert len(ours.weights) == 1


def test_rope_depends_on_distance_and_its_gradient_turns_back():
    rotary = RotaryEmbedding(8, 100.0)
    q, k = array(1, 1, 1, 8), array(1, 1, 1, 8, seed=1)

    def score(i, j):
        turned = [rotary.at(np.array([place])).of(tf.constant(one)) for one, place in ((q, i), (k, j))]
        return float(tf.reduce_sum(turned[0] * turned[1]))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
    x = array(2, 2, 5, 8)
    cos, sin = (np.asarray(one) for one in dataclasses.astuple(rotary.at(np.arange(5))))

    def plain(x):
        first, second = x[..., :4], x[..., 4:]
        return tf.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)

    near(gradients_of(rotary.at(np.arange(5)).of, x), gradients_of(plain, x))
    each = rotary.at_each(tf.constant([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]))
    near(each.of(tf.constant(x)), rotary.at(np.arange(5)).of(tf.constant(x)))


@pytest.mark.parametrize("window", [1, 3, 5, 40])
@pytest.mark.parametrize("blockwise", [False, True])
def test_attention_in_a_window_is_masked_attention(window, blockwise):
    q, k, v = (array(2, 2, 13, 4, seed=seed) for seed in range(3))
    distance = np.arange(13)[:, None] - np.arange(13)
    hidden = np.where((distance < 0) | (distance >= window), np.float32(attention.MASKED), np.float32(0))

    def ours(q, k, v):
        if blockwise:
            return attention.blockwise_attention(q, k, v, 4, window)
        return attention.attention(q, k, v, window)

    def plain(q, k, v):
        scores = tf.matmul(q, k, transpose_b=True) * 0.5 + hidden
        return tf.matmul(tf.nn.softmax(scores), v)

    near(gradients_of(ours, q, k, v), gradients_of(plain, q, k, v))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kv_heads": 3}, "kv_heads 3 does not divide heads 4"),
        ({"position_embedding": "rope", "head_width": 7}, "a head is 7 wide: use an even head_width"),
        ({"rope_scaling": "linear:2"}, "Use position_embedding rope"),
        ({"position_embedding": "rope", "rope_scaling": "yarn:2"}, "linear:FACTOR, llama3:FACTOR:LOW"),
        ({"position_embedding": "rope", "rope_scaling": "llama3:8:4:1:99"}, "LOW must be below HIGH"),
        ({"position_embedding": "rope", "rope_scaling": "linear:nan"}, "with numbers above 0"),
        ({"sliding_window": 4, "task": "masked-lm"}, "windows are of causal attention"),
        ({"heads": 5}, "heads 5 does not divide width 24"),
        ({"kv_heads": 2, "tensor_parallel": 4}, "kv_heads"),
        ({"ffn_width": 42, "tensor_parallel": 4}, "ffn_width"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        Config(**{"width": D, "heads": 4, **wrong})


def test_widths():
    assert TransformerOptions().width_of_ffn(96) == 384
    assert TransformerOptions(activation="swiglu").width_of_ffn(96) == 256
    assert TransformerOptions(activation="swiglu", ffn_width=99).width_of_ffn(96) == 99
    assert str(RopeScaling.parsed("llama3:8:1:4:8192")) == "llama3:8:1:4:8192"
    slow = RotaryEmbedding(8, 1e4, RopeScaling.parsed("linear:4")).frequencies()
    np.testing.assert_allclose(slow * 4, RotaryEmbedding(8, 1e4).frequencies(), rtol=1e-6)
