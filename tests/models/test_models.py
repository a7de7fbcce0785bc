"""Legend: B rows, T tokens, D width, V vocabulary, L layers."""

import sys
import textwrap

import keras
import numpy as np
import pytest

from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.models import lstm, transformer
from tf_dist.models.build import build, check

V, T, D = 11, 8, 16
TINY = {"vocab_size": V, "seq_len": T, "width": D, "layers": 1, "heads": 2}
both = pytest.mark.parametrize("name", ["transformer", "lstm"])


def tokens(rows=3, seed=0):
    return np.random.default_rng(seed).integers(0, V, (rows, T)).astype(np.int32)


def parameters(model):
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def weights(model):
    return [variable.numpy() for variable in model.trainable_variables]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("vocab", "seq_len", "layers", "width"), [(11, 8, 1, 16), (7, 2, 3, 4), (30, 5, 2, 12)]
)
def test_parameter_counts_are_the_formulas(vocab, seq_len, layers, width, tied):
    model = transformer.build(vocab, seq_len, layers, width, 2, 0.1, tied)
    assert parameters(model) == transformer.parameter_count(vocab, seq_len, layers, width, tied)
    model = lstm.build(vocab, seq_len, layers, width, 0.1, tied)
    assert parameters(model) == lstm.parameter_count(vocab, layers, width, tied)


def test_parameter_counts_that_others_publish():
    assert transformer.parameter_count(50257, 1024, 12, 768) == 124_439_808  # GPT-2 small
    assert lstm.parameter_count(0, 2, 1500) == 2 * 4 * (1500 * 1500 * 2 + 1500)


@both
@pytest.mark.parametrize("tied", [True, False])
def test_shapes(name, tied):
    model = build(Config(model=name, tie_embeddings=tied, **TINY))
    for rows in (1, 3):
        logits = model(tokens(rows))
        assert tuple(logits.shape) == (rows, T, V)
        assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    assert model.input_shape == (None, T)


@both
def test_no_logit_depends_on_a_later_token(name):
    model = build(Config(model=name, **{**TINY, "layers": 2}))
    x = tokens()
    before = model(x).numpy()
    for t in range(T):
        changed = x.copy()
        changed[:, t] = (changed[:, t] + 1) % V
        after = model(changed).numpy()
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(axis=(0, 2)).all()  # and all later ones do


@both
def test_rows_do_not_see_each_other(name):
    model = build(Config(model=name, **TINY))
    x = tokens()
    changed = x.copy()
    changed[1] = 0
    np.testing.assert_allclose(model(changed).numpy()[::2], model(x).numpy()[::2], atol=1e-6)


@both
def test_initial_weights_depend_on_the_seed_alone(name):
    first = weights(build(Config(model=name, seed=3, **TINY)))
    keras.random.normal((5,))  # somebody else draws
    np.random.standard_normal(3)
    again = weights(build(Config(model=name, seed=3, **TINY)))
    other = weights(build(Config(model=name, seed=4, **TINY)))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@both
def test_the_largest_seed_a_configuration_takes(name):
    build(Config(model=name, seed=2**32 - 1, **TINY))


@both
def test_dropout_is_for_training(name):
    model = build(Config(model=name, dropout=0.5, **TINY))
    x = tokens()
    np.testing.assert_array_equal(model(x).numpy(), model(x).numpy())
    assert (model(x, training=True).numpy() != model(x, training=True).numpy()).any()


@both
def test_a_fresh_model_knows_nothing(name):
    model = build(Config(model=name, **TINY))
    logits = model(tokens()).numpy()
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert np.abs(chances - 1 / V).max() < 0.05


def test_residual_projections_begin_smaller_in_deeper_models():
    model = transformer.build(V, T, 8, 32, 2)
    kernel = model.get_layer("layer_0_attention").output_projection.kernel
    assert kernel.numpy().std() == pytest.approx(0.02 / 16**0.5, rel=0.1)


def test_a_transformer_layer_can_be_made_from_its_own_description():
    layer = transformer.CausalSelfAttention(2, 0.1, 0.02)
    assert transformer.CausalSelfAttention.from_config(layer.get_config()).get_config() == layer.get_config()


def layers_of(model):
    return [layer for layer in model._flatten_layers() if layer is not model]


@both
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_the_layers_and_of_nothing_else(name, precision):
    before = keras.config.dtype_policy()
    model = build(Config(model=name, precision=precision, dropout=0.1, **TINY))
    assert keras.config.dtype_policy() == before
    assert {layer.compute_dtype for layer in layers_of(model)} == {precision}
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    # Keras's embedding multiplies as it looks up, in float32: so are the logits.
    assert keras.backend.standardize_dtype(model(tokens()).dtype) == "float32"
    first = build(Config(model=name, dropout=0.1, **TINY))
    for a, b in zip(weights(model), weights(first), strict=True):
        np.testing.assert_array_equal(a, b)  # the same initial weights


@both
def test_bfloat16_is_near_float32(name):
    sizes = {**TINY, "layers": 2}
    exact, short = (build(Config(model=name, precision=p, **sizes)) for p in ("float32", "bfloat16"))
    for i, (a, b) in enumerate(zip(exact.trainable_variables, short.trainable_variables, strict=True)):
        value = a.numpy() + 0.1 * np.random.default_rng(i).standard_normal(a.shape).astype(np.float32)
        a.assign(value)
        b.assign(value)
    expected, found = exact(tokens()).numpy(), keras.ops.cast(short(tokens()), "float32").numpy()
    # Eight bits of mantissa, rounded some twenty times.
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert np.abs(found - expected).max() > 0


# The user's own ------------------------------------------------------------------------------------

MODULE = """
    import keras
    from keras import layers

    number = 3
    policy_at_import = keras.config.dtype_policy().name

    def plain(config):
        tokens = keras.Input((None,), dtype="int32")
        x = layers.Embedding(config.vocab_size, config.width)(tokens)
        return keras.Model(tokens, layers.Dense(config.vocab_size)(x))

    class Bigram(keras.Model):
        def __init__(self, vocab_size):
            super().__init__()
            self.table = layers.Embedding(vocab_size, vocab_size)

        def call(self, tokens):
            return self.table(tokens)

    def subclassed(config):
        return Bigram(config.vocab_size)

    def no_model(config):
        return lambda tokens: tokens

    def one_too_many(config):
        return Bigram(config.vocab_size + 1)

    def last_only(config):
        tokens = keras.Input((config.seq_len,), dtype="int32")
        x = layers.Flatten()(layers.Embedding(config.vocab_size, 4)(tokens))
        return keras.Model(tokens, layers.Dense(config.vocab_size)(x))

    def of_other_length(config):
        tokens = keras.Input((config.seq_len + 1,), dtype="int32")
        return keras.Model(tokens, layers.Embedding(config.vocab_size, config.vocab_size)(tokens))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user stands in a folder with ``users_models.py``; the path and the modules are put back."""
    (tmp_path / "users_models.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("users_models", None)


@pytest.mark.parametrize("function", ["plain", "subclassed"])
def test_the_users_own_model(folder, function):
    model = build(Config(model=f"users_models:{function}", **TINY))
    assert model.built
    assert tuple(model(tokens()).shape) == (3, T, V)
    again = build(Config(model=f"users_models:{function}", **TINY))
    for a, b in zip(weights(model), weights(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("users_modles:plain", "No module named 'users_modles'"),
        ("users_models:plian", "plian"),
        ("users_models:", "--model users_models:"),
        (":plain", "--model :plain"),
        (".users_models:plain", "--model .users_models:plain"),
        ("users_models:number", "is a int, not a function"),
        ("users_models:no_model", "returned a function, not a keras.Model"),
        ("users_models:one_too_many", f"to (1, {T}, {V + 1}), not to logits of shape (1, {T}, {V})"),
        ("users_models:last_only", f"to (1, {V}), not to logits of shape (1, {T}, {V})"),
        ("users_models:of_other_length", f"does not take token ids of shape (B, {T})"),
    ],
)
def test_models_that_cannot_be_used(folder, name, said):
    with pytest.raises(UsageError) as caught:
        build(Config(model=name, **TINY))
    assert said in str(caught.value)
    assert caught.value.exit_code == 64


@pytest.mark.parametrize("function", ["plain", "subclassed"])
def test_the_users_own_model_in_bfloat16(folder, function):
    """Its layers compute in it; what else the user's code makes does not."""
    model = build(Config(model=f"users_models:{function}", precision="bfloat16", **TINY))
    assert {layer.compute_dtype for layer in layers_of(model) if layer.weights} == {"bfloat16"}
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    assert sys.modules["users_models"].policy_at_import == "float32"
    assert keras.config.dtype_policy().name == "float32"


def test_precision_is_put_back_after_an_error(folder):
    with pytest.raises(UsageError):
        build(Config(model="users_models:no_model", precision="bfloat16", **TINY))
    assert keras.config.dtype_policy().name == "float32"


def test_check_says_whose_model_it_is():
    with pytest.raises(UsageError, match=r"^mine returned a dict"):
        check({}, "mine", T, (T, V))
