"""Our LSTM against Keras's. Legend: B rows, T steps, E width of the input, H units."""

from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dist.models import fast_lstm, lstm

B, T, E, H = 3, 5, 4, 6
MORE_SIZES = [(3, 1, 4, 6), (1, 5, 4, 6), (2, 40, 3, 5), (32, 9, 64, 48)]


def more(value):
    """What repeats other cases: with ``TF_DIST_TESTS=all``."""
    return pytest.param(value, marks=pytest.mark.extended)


TOLERANCE = 1e-5  # of the largest absolute value of a tensor


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@dataclass(eq=False)
class Case:
    """One layer and what it is called with; ``arguments`` are the layer's."""

    sizes: tuple[int, int, int, int] = (B, T, E, H)
    mask: Any = None
    state: bool = True
    training: bool = False
    dtype: str = "float32"
    arguments: dict = field(default_factory=dict)

    def layer(self, kind):
        """The layer with weights that are none of the initial ones, biases above all."""
        _, _, e, h = self.sizes
        arguments = {"return_sequences": True, "return_state": True, "seed": 3} | self.arguments
        layer = kind(h, dtype=self.dtype, **arguments)
        layer.build((None, None, e))
        layer.set_weights([0.5 * normal(*w.shape, seed=9) for w in layer.get_weights()])
        return layer

    def inputs(self):
        b, t, e, h = self.sizes
        state = [0.5 * normal(b, h, seed=1), normal(b, h, seed=2)] if self.state else []
        return [tf.constant(x, self.dtype) for x in (normal(b, t, e), *state)]


def gradients_of(layer, case, inputs):
    """The outputs, and the gradients of a sum that weighs every output differently."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        keywords = {"mask": case.mask, "training": case.training}
        outputs = layer(inputs[0], initial_state=inputs[1:] or None, **keywords)
        outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
        weighted = [tf.cast(y, tf.float64) * normal(*y.shape, seed=7) for y in outputs]
        loss = tf.add_n([tf.reduce_sum(y) for y in weighted])
    weights = [variable.value for variable in layer.trainable_variables]
    return list(outputs), tape.gradient(loss, [*inputs, *weights])


def run(kind, case, compiled=False, **options):
    layer, inputs = case.layer(kind), case.inputs()
    function = tf.function(gradients_of, **options) if compiled else gradients_of
    outputs, gradients = function(layer, case, inputs)
    assert len(gradients) == len(inputs) + len(layer.trainable_variables)
    return [tf.cast(x, tf.float64).numpy() for x in [*outputs, *gradients]]


def assert_close(found, expected, tolerance=TOLERANCE):
    for ours, keras_s in zip(found, expected, strict=True):
        assert ours.shape == keras_s.shape
        assert np.isfinite(keras_s).all()
        assert np.abs(ours - keras_s).max() <= tolerance * np.abs(keras_s).max()


def compare(case, tolerance=TOLERANCE):
    """Ours compiled, as everybody trains, with Keras's eager: it costs seconds to compile."""
    ours = run(fast_lstm.LSTM, case, compiled=True)
    assert_close(ours, run(keras.layers.LSTM, case), tolerance)
    return ours


MASKS = {
    "random": np.random.default_rng(5).random((B, T)) < 0.5,
    "right": np.arange(T) < np.array([[T], [2], [3]]),
    "left": np.arange(T) >= np.array([[0], [2], [3]]),
    "a row of nothing": np.array([[True] * T, [False] * T, [True, False] * 2 + [True]]),
    "numbers": np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0]], np.float32),
}


@pytest.mark.parametrize("sizes", [(B, T, E, H), (1, 1, 1, 1), *(more(one) for one in MORE_SIZES)], ids=str)
@pytest.mark.parametrize("state", [True, False])
def test_outputs_and_every_gradient_are_kerass(sizes, state):
    compare(Case(sizes, state=state))


@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("masked", [more(None), "random"])
def test_what_is_returned(sequences, state, masked):
    case = Case(mask=MASKS.get(masked), arguments={"return_sequences": sequences, "return_state": state})
    assert len(compare(case)) == (3 if state else 1) + 6


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("backwards", [True, more(False)])
def test_masks(mask, zero, backwards):
    arguments = {"zero_output_for_mask": zero, "go_backwards": backwards}
    compare(Case(mask=MASKS[mask], arguments=arguments))
    ours, keras_s = (
        Case(arguments=arguments | {"return_sequences": False}).layer(kind)(
            normal(B, T, E), mask=MASKS[mask], initial_state=[normal(B, H)] * 2
        )
        for kind in (fast_lstm.LSTM, keras.layers.LSTM)
    )
    assert_close([x.numpy() for x in ours], [x.numpy() for x in keras_s])


def test_a_mask_made_by_a_layer_before():
    tokens_BxT = np.array([[1, 2, 0, 0], [3, 0, 1, 0], [2, 1, 1, 2]])
    outputs = []
    for kind in (fast_lstm.LSTM, keras.layers.LSTM):
        keras.utils.set_random_seed(0)
        embedding = keras.layers.Embedding(4, E, mask_zero=True)
        outputs.append(keras.Sequential([embedding, kind(H), keras.layers.Dense(2)])(tokens_BxT).numpy())
    assert_close(outputs[:1], outputs[1:])


def test_backwards_and_without_bias():
    compare(Case(arguments={"go_backwards": True}))
    assert len(compare(Case(arguments={"use_bias": False}))) == 3 + 5


@pytest.mark.parametrize("masked", [more(None), "random"])
@pytest.mark.parametrize(
    "drop",
    [
        {"dropout": 0.4},
        {"recurrent_dropout": 0.4},
        {"dropout": 0.3, "recurrent_dropout": 0.3},
        {"dropout": 0.4, "implementation": 1, "use_cudnn": False},
    ],
    ids=str,
)
def test_dropout_draws_what_keras_draws(drop, masked):
    case = Case((B, T, 16, 12), mask=MASKS.get(masked), training=True, arguments=drop)
    dropped = compare(case)
    case.training = False
    kept = compare(case)
    assert np.abs(dropped[0] - kept[0]).max() > 0.01  # it did drop something


def both_kinds():
    return fast_lstm.LSTM, keras.layers.LSTM


def test_every_call_drops_something_else():
    layers = [Case(arguments={"dropout": 0.5, "recurrent_dropout": 0.5}).layer(k) for k in both_kinds()]
    x = normal(B, T, E)
    first, second = ([layer(x, training=True)[0].numpy() for layer in layers] for _ in range(2))
    assert_close(first[:1], first[1:])
    assert_close(second[:1], second[1:])
    assert np.abs(first[0] - second[0]).max() > 0.01
    # And the generators stand where Keras's stand, for whoever draws next.
    states = [layer.cell.seed_generator.state.numpy() for layer in layers]
    np.testing.assert_array_equal(*states)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(mask=MASKS["random"], training=True, arguments={"dropout": 0.3, "recurrent_dropout": 0.3}),
    ],
    ids=["plain", "all of it"],
)
def test_eager_and_compiled(case):
    expected = run(keras.layers.LSTM, case)
    assert_close(run(fast_lstm.LSTM, case), expected)
    assert_close(run(fast_lstm.LSTM, case, compiled=True), expected)


def test_under_xla_as_model_fit_compiles_it():
    case = Case(mask=MASKS["random"])
    assert_close(run(fast_lstm.LSTM, case, compiled=True, jit_compile=True), run(keras.layers.LSTM, case))


def test_a_tape_outside_of_the_compiled_function():
    case = Case(mask=MASKS["left"])
    layer = case.layer(fast_lstm.LSTM)
    inner = tf.function(lambda x, state: layer(x, initial_state=state, mask=case.mask))

    def forward(x, initial_state, **_):
        return inner(x, initial_state)

    forward.trainable_variables = layer.trainable_variables
    outputs, gradients = gradients_of(forward, case, case.inputs())
    found = [x.numpy() for x in [*outputs, *gradients]]
    assert_close(found, run(keras.layers.LSTM, case))


def test_batches_and_lengths_of_any_size_in_one_graph():
    ours, keras_s = (Case().layer(kind) for kind in both_kinds())

    def compiled(layer):
        @tf.function(input_signature=[tf.TensorSpec((None, None, E)), tf.TensorSpec((None, None), tf.bool)])
        def function(x, mask):
            with tf.GradientTape() as tape:
                tape.watch(x)
                outputs = layer(x, mask=mask)
                loss = tf.add_n([tf.reduce_sum(y**2) for y in outputs])
            weights = [variable.value for variable in layer.trainable_variables]
            return [*outputs, *tape.gradient(loss, [x, *weights])]

        return function

    ours, keras_s = compiled(ours), compiled(keras_s)
    for b, t in ((1, 1), (3, 5), (4, 2)):
        x, mask = normal(b, t, E), np.random.default_rng(b).random((b, t)) < 0.7
        assert_close([y.numpy() for y in ours(x, mask)], [y.numpy() for y in keras_s(x, mask)])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("bfloat16", 3e-2), ("float16", 4e-3)])
def test_other_precisions(dtype, tolerance):
    # Keras's own initializer has no bfloat16.
    arguments = {"recurrent_initializer": "glorot_uniform"}
    compare(Case(dtype=dtype, mask=MASKS["random"], arguments=arguments), tolerance)


def test_mixed_precision_keeps_float32_weights():
    case = Case(dtype="mixed_bfloat16", state=False)
    layers = [case.layer(kind) for kind in both_kinds()]
    ours, keras_s = ([tf.cast(y, tf.float32).numpy() for y in layer(normal(B, T, E))] for layer in layers)
    assert layers[0].cell.kernel.dtype == "float32"
    assert layers[0](normal(B, T, E))[0].dtype == tf.bfloat16
    assert_close(ours, keras_s, 3e-2)


# Second derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("source", ["inputs", "initial state", "weights"])
def test_a_second_derivative_is_refused(source, compiled):
    # The loss is linear in the outputs: only what the layer itself computes depends on anything.
    layer = Case().layer(fast_lstm.LSTM)
    x, h, c = Case().inputs()
    of = {"inputs": x, "initial state": c, "weights": layer.cell.recurrent_kernel.value}[source]

    def twice():
        with tf.GradientTape() as outer:
            outer.watch(of)
            with tf.GradientTape() as inner:
                inner.watch(of)
                loss = tf.reduce_sum(layer(x, initial_state=[h, c])[0])
            gradient = inner.gradient(loss, of)
        return outer.gradient(gradient, of)

    with pytest.raises(NotImplementedError, match="no second derivative"):
        (tf.function(twice) if compiled else twice)()


# What Keras computes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{"activation": "relu"}, {"recurrent_activation": "hard_sigmoid"}, {"unroll": True}, {}],
    ids=str,
)
def test_what_is_left_to_keras(arguments, monkeypatch):
    calls = []
    stock = keras.layers.LSTM.inner_loop

    def counted(self, *args, **kwargs):
        calls.append(type(self))
        return stock(self, *args, **kwargs)

    compare(Case(arguments=arguments))
    monkeypatch.setattr(keras.layers.LSTM, "inner_loop", counted)
    Case(arguments=arguments).layer(fast_lstm.LSTM)(normal(B, T, E))
    assert calls == ([fast_lstm.LSTM] if arguments else [])


def test_a_gpu_kernel_that_is_demanded_and_missing():
    if tf.config.list_logical_devices("GPU"):
        pytest.skip("it is not missing here")
    with pytest.raises(ValueError, match="use_cudnn=True"):
        Case(arguments={"use_cudnn": True}).layer(fast_lstm.LSTM)(normal(B, T, E))


def test_stateful():
    layers = []
    for kind in both_kinds():
        layer = kind(H, stateful=True, return_sequences=True)
        layer.build((B, T, E))
        layer.set_weights([0.5 * normal(*w.shape) for w in layer.get_weights()])
        layers.append(layer)
    for seed in range(3):
        ours, keras_s = ([layer(normal(B, T, E, seed=seed)).numpy()] for layer in layers)
        assert_close(ours, keras_s)


def test_inside_bidirectional():
    models = [keras.layers.Bidirectional(kind(H, return_sequences=True)) for kind in both_kinds()]
    for model in models:
        model.build((None, T, E))
        model.set_weights([0.5 * normal(*w.shape) for w in model.get_weights()])
    assert type(models[0].backward_layer) is fast_lstm.LSTM
    ours, keras_s = ([model(normal(B, T, E), mask=MASKS["right"]).numpy()] for model in models)
    assert_close(ours, keras_s)


# Weights, files, the model ------------------------------------------------------------------------


def small(kind, name=None):
    keras.utils.set_random_seed(4)
    layer = kind(H, dropout=0.1, seed=5, name=name)
    return keras.Sequential([keras.Input((None, E)), layer], name="small")


def test_weights_are_kerass(tmp_path):
    ours, keras_s = small(fast_lstm.LSTM, "a"), small(keras.layers.LSTM, "a")
    assert [v.path for v in ours.trainable_variables] == [v.path for v in keras_s.trainable_variables]
    for a, b in zip(ours.get_weights(), keras_s.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)  # the initial ones, too
    keras_s.set_weights([normal(*w.shape) for w in keras_s.get_weights()])
    ours.set_weights(keras_s.get_weights())
    expected = keras_s(normal(B, T, E)).numpy()
    assert_close([ours(normal(B, T, E)).numpy()], [expected])
    for source, kind in ((keras_s, fast_lstm.LSTM), (ours, keras.layers.LSTM)):
        source.save_weights(tmp_path / "a.weights.h5")
        target = small(kind)
        target.load_weights(tmp_path / "a.weights.h5")
        assert_close([target(normal(B, T, E)).numpy()], [expected])


def test_configuration():
    layer = fast_lstm.LSTM(H, return_sequences=True, go_backwards=True, dropout=0.2, recurrent_dropout=0.1)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is fast_lstm.LSTM
    assert again.get_config() == layer.get_config() == keras.layers.LSTM(**layer.get_config()).get_config()


def test_a_saved_model_loads(tmp_path):
    model = small(fast_lstm.LSTM)
    model.save(tmp_path / "a.keras")
    again = keras.saving.load_model(tmp_path / "a.keras")
    assert type(again.layers[0]) is fast_lstm.LSTM
    np.testing.assert_array_equal(again(normal(B, T, E)).numpy(), model(normal(B, T, E)).numpy())


@pytest.mark.parametrize("case", [Case((8, 16, 32, 32)), Case(mask=MASKS["random"])], ids=["plain", "masked"])
def test_bits_are_the_same_every_time(case):
    first = run(fast_lstm.LSTM, case, compiled=True)
    run(keras.layers.LSTM, case)
    for a, b in zip(run(fast_lstm.LSTM, case, compiled=True), first, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_language_model_is_the_same_with_either():
    keras.utils.set_random_seed(0)
    ours = lstm.build(11, 8, 2, 16)
    keras.utils.set_random_seed(0)
    keras_s = lstm.build(11, 8, 2, 16, recurrent_layer=keras.layers.LSTM)
    assert type(ours.get_layer("layer_1")) is fast_lstm.LSTM
    assert type(keras_s.get_layer("layer_1")) is keras.layers.LSTM
    ours_named, keras_s_named = ([(v.path, v.shape) for v in m.trainable_variables] for m in (ours, keras_s))
    assert ours_named == keras_s_named
    for a, b in zip(ours.get_weights(), keras_s.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    tokens = np.random.default_rng(0).integers(0, 11, (3, 8))
    assert_close([ours(tokens).numpy()], [keras_s(tokens).numpy()])
