"""Legend: B rows of a micro-batch, T tokens, V vocabulary, P parameters."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.models.build import build
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.runners.replica import Replica
from tf_dist.runners.rng import random_states

B, T, V = 2, 8, 11
TINY = {"vocab_size": V, "seq_len": T, "width": 16, "layers": 1, "heads": 2}


def replica_of(model, optimizer=None, seed=1, rows=B):
    return Replica(model, optimizer or keras.optimizers.SGD(0.1), rows, T, seed)


def tiny(name="transformer", **values):
    return build(Config(model=name, **{**TINY, **values}))


def batch(seed=0, rows=B):
    random = np.random.default_rng(seed)
    return tuple(random.integers(0, V, (rows, T)).astype(np.int32) for _ in range(2))


def plain(model, x, y):
    """The summed loss and its gradient, the way a textbook would write it."""
    with tf.GradientTape() as tape:
        losses = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True), from_logits=True)
        loss = tf.reduce_sum(losses)
    gradient = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    flat = np.concatenate([tf.convert_to_tensor(part).numpy().ravel() for part in gradient])
    return float(loss), flat


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["transformer", "lstm"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_summed_loss(name, tied):
    model = tiny(name, tie_embeddings=tied)
    replica, (x, y) = replica_of(model), batch()
    gradient, sums = replica.gradients(x, y, (0, 0))
    loss, expected = plain(model, x, y)
    assert gradient.dtype == np.float32
    assert gradient.shape == (replica.parameters,)
    assert sums.dtype == np.float64
    close(gradient, expected)
    correct = (model(x).numpy().argmax(-1) == y).sum()
    np.testing.assert_allclose(sums, [loss, B * T, correct], rtol=1e-6)
    np.testing.assert_allclose(replica.evaluate(x, y), sums, rtol=1e-6)


def test_padding_contributes_nothing():
    model = tiny()
    replica, (x, y) = replica_of(model), batch()
    alone, alone_sums = replica_of(model, rows=1).gradients(x[:1], y[:1], (0, 0))
    y[1] = -1
    gradient, sums = replica.gradients(x, y, (0, 0))
    close(gradient, alone)
    np.testing.assert_allclose(sums, alone_sums, rtol=1e-6)
    # Nor does what stands in a padded place, at the end of a row or in a row of nothing else.
    y[0, 5:] = -1
    gradient, sums = replica.gradients(x, y, (0, 0))
    assert sums[1] == 5
    x[1], x[0, 5:] = 3, 7
    elsewhere, sums_elsewhere = replica.gradients(x, y, (0, 0))
    close(elsewhere, gradient)
    np.testing.assert_allclose(sums_elsewhere, sums, rtol=1e-6)


def test_nothing_but_padding():
    replica = replica_of(tiny())
    x, y = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
    gradient, sums = replica.gradients(x, y, (0, 0))
    assert not gradient.any()
    assert sums.tolist() == [0, 0, 0]
    assert replica.evaluate(x, y).tolist() == [0, 0, 0]


def test_rows_add_up():
    model = tiny()
    x, y = batch(rows=4)
    whole, sums = replica_of(model, rows=4).gradients(x, y, (0, 0))
    half = replica_of(model, rows=2)
    parts = [half.gradients(x[i : i + 2], y[i : i + 2], (0, 0)) for i in (0, 2)]
    close(parts[0][0].copy() + parts[1][0], whole)
    np.testing.assert_allclose(parts[0][1] + parts[1][1], sums, rtol=1e-6)


def test_everything_is_traced_once():
    replica = replica_of(tiny(dropout=0.1))
    weights = aligned_empty(replica.parameters)
    for step in range(4):
        x, y = batch(step)
        gradient, _ = replica.gradients(x, y, (step, 0))
        replica.evaluate(x, y)
        replica.apply(gradient.copy(), 0.5 + step)
        replica.read_weights(weights)
        replica.write_weights(weights)
    traced = [replica._gradients[False], replica._evaluate, replica._read, replica._write]
    traced += [replica.optimizer_step._step, replica.optimizer_step._together]
    assert [function.experimental_get_tracing_count() for function in traced] == [1] * len(traced)


# Dropout ------------------------------------------------------------------------------------------


def test_dropout_depends_on_seed_step_and_micro_batch_alone():
    x, y = batch()
    used, fresh = replica_of(tiny(dropout=0.5)), replica_of(tiny(dropout=0.5))
    other_seed = replica_of(tiny(dropout=0.5), seed=2)
    places = [(3, 2), (3, 1), (2, 2), (2, 3)]
    drawn = [used.gradients(x, y, place)[0].tobytes() for place in places]
    used.evaluate(x, y)
    assert used.gradients(x, y, (3, 2))[0].tobytes() == drawn[0]
    assert fresh.gradients(x, y, (3, 2))[0].tobytes() == drawn[0]
    drawn.append(other_seed.gradients(x, y, (3, 2))[0].tobytes())
    assert len(set(drawn)) == len(places) + 1


class Jitter(layers.Layer):
    """Noise without a seed or generator of its own: Keras draws from its global one."""

    def call(self, x, training=False):
        return x + keras.random.normal(keras.ops.shape(x)) if training else x


class Attention(layers.Layer):
    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, 4, dropout=0.5)

    def call(self, x, training=False):
        return self.attention(x, x, training=training)


RANDOM_LAYERS = {
    "Dropout": lambda: layers.Dropout(0.5),
    "AlphaDropout": lambda: layers.AlphaDropout(0.5),
    "GaussianDropout": lambda: layers.GaussianDropout(0.5),
    "GaussianNoise": lambda: layers.GaussianNoise(1.0),
    "SpatialDropout1D": lambda: layers.SpatialDropout1D(0.5),
    "MultiHeadAttention": Attention,
    "LSTM": lambda: layers.LSTM(6, return_sequences=True, dropout=0.3),
    "LSTM, recurrent": lambda: layers.LSTM(6, return_sequences=True, recurrent_dropout=0.3),
    "GRU": lambda: layers.GRU(6, return_sequences=True, dropout=0.3, recurrent_dropout=0.3),
    "SimpleRNN": lambda: layers.SimpleRNN(6, return_sequences=True, dropout=0.3),
    "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(4, return_sequences=True, dropout=0.5)),
    "StackedRNNCells": lambda: layers.RNN(
        [layers.LSTMCell(4, dropout=0.5), layers.GRUCell(4, recurrent_dropout=0.5)], return_sequences=True
    ),
    "TimeDistributed": lambda: layers.TimeDistributed(layers.Dropout(0.5)),
    "a seed given": lambda: layers.Dropout(0.5, seed=3),
    "no generator": Jitter,
    "keras.random in a Lambda": lambda: layers.Lambda(lambda x: x + keras.random.uniform((B, T, 6))),
}


# Of recurrent layers, whose graphs are large, one of a kind.
RECURRENT = ("LSTM", "SimpleRNN", "Bidirectional", "StackedRNNCells")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.extended] * (name in RECURRENT)) for name in RANDOM_LAYERS]
)
def test_every_random_layer_depends_on_seed_step_and_micro_batch_alone(name):
    """Whatever was drawn before: in another order, or by another process with another global seed."""

    def made(global_seed):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [keras.Input((T,), dtype="int32"), layers.Embedding(V, 6), RANDOM_LAYERS[name](), layers.Dense(V)]
        )
        keras.utils.set_random_seed(global_seed)
        return replica_of(model)

    x, y = batch()
    used, fresh = made(2), made(3)
    places = [(3, 1), (2, 2), (3, 2), (3, 3)]
    drawn = {place: used.gradients(x, y, place)[0].tobytes() for place in places}
    assert len(set(drawn.values())) == len(places)
    assert fresh.gradients(x, y, (3, 2))[0].tobytes() == drawn[3, 2]
    assert used.gradients(x, y, (3, 1))[0].tobytes() == drawn[3, 1]


def test_random_numbers_that_are_not_keras_own_are_found():
    def model(layer):
        return keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, V), layer])

    noisy = layers.Lambda(lambda x: tf.map_fn(lambda row: row + tf.random.normal((T, V)), x))
    assert replica_of(model(noisy)).foreign_draws() == ["RandomStandardNormal"]
    assert replica_of(model(layers.LSTM(V, return_sequences=True, dropout=0.5))).foreign_draws() == []


def test_without_dropout_the_place_does_not_matter():
    replica, (x, y) = replica_of(tiny()), batch()
    assert replica.gradients(x, y, (0, 0))[0].tobytes() == replica.gradients(x, y, (5, 3))[0].tobytes()


def test_random_states_never_change():
    # A resumed run on another version must drop the same activations.
    assert random_states(1, (0, 0), 2).tolist() == [[917752063, 865519474], [660112278, 1165020752]]
    states = random_states(2**40, (10**9, 10**6), 3)
    assert states.shape == (3, 2)
    assert states.dtype == np.int64
    assert (0 <= states).all()
    assert (states < 2**31).all()
    assert random_states(1, (0, 0), 0).shape == (0, 2)


# Weights ------------------------------------------------------------------------------------------


def test_weights_out_and_in():
    model = tiny()
    replica = replica_of(model)
    before = aligned_empty(replica.parameters)
    replica.read_weights(before)
    expected = np.concatenate([variable.numpy().ravel() for variable in model.trainable_variables])
    np.testing.assert_array_equal(before, expected)
    # Aligned, not aligned, and not to be written to: the three ways into TensorFlow.
    for weights in (before * 2, np.arange(replica.parameters + 1, dtype=np.float32)[1:], before * 3):
        weights.setflags(write=weights[0] != before[0] * 3)
        replica.write_weights(weights)
        after = aligned_empty(replica.parameters)
        replica.read_weights(after)
        np.testing.assert_array_equal(after, weights)
    replica.write_weights(before)
    for view, variable in zip(replica.layout.views(before), model.trainable_variables, strict=True):
        np.testing.assert_array_equal(view, variable.numpy())


def test_a_buffer_may_be_used_again_after_it_was_written():
    replica = replica_of(tiny())
    weights = aligned_empty(replica.parameters)
    weights.fill(0.25)
    replica.write_weights(weights)
    weights.fill(9.0)
    after = aligned_empty(replica.parameters)
    replica.read_weights(after)
    assert (after == 0.25).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 5), clipnorm=0.1),
    ],
    ids=["sgd", "adamw", "adam"],
)
def test_apply_is_the_optimizers_own_step(make):
    model, other = tiny(), tiny()
    replica, optimizer = replica_of(model, make()), make()
    random = np.random.default_rng(0)
    for step in range(3):
        gradient = aligned_empty(replica.parameters)
        gradient[:] = random.standard_normal(replica.parameters)
        unchanged = gradient.copy()
        replica.apply(gradient if step else gradient.copy()[:], 0.25)
        np.testing.assert_array_equal(gradient, unchanged)
        parts = [part * np.float32(0.25) for part in replica.layout.views(gradient)]
        optimizer.apply([tf.convert_to_tensor(part) for part in parts], other.trainable_variables)
    for a, b in zip(model.trainable_variables, other.trainable_variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6, atol=1e-6)
    assert int(replica.optimizer.iterations.numpy()) == 3


def test_a_skipped_step_counts_and_changes_nothing():
    schedule = keras.optimizers.schedules.PolynomialDecay(1.0, 4, 0.0)
    replica = replica_of(tiny(), keras.optimizers.SGD(schedule))
    before, after = aligned_empty(replica.parameters), aligned_empty(replica.parameters)
    replica.read_weights(before)
    replica.skip()
    replica.read_weights(after)
    np.testing.assert_array_equal(before, after)
    assert float(replica.optimizer.learning_rate) == 0.75


# Models of all kinds ------------------------------------------------------------------------------


def sequential(*middle, name="mine"):
    return keras.Sequential(
        [keras.Input((T,), dtype="int32"), layers.Embedding(V, 4), *middle, layers.Dense(V)], name=name
    )


def test_added_losses_count_once_for_every_target():
    model = sequential(layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.5), name="penalised"))
    replica, (x, y) = replica_of(model), batch()
    y[1, 2:] = -1
    with_penalty, sums = replica.gradients(x, y, (0, 0))
    kernel = model.get_layer("penalised").kernel
    place = [variable is kernel for variable in model.trainable_variables].index(True)
    without = sequential(layers.Dense(4))
    without.set_weights(model.get_weights())
    plain_gradient, plain_sums = replica_of(without).gradients(x, y, (0, 0))
    difference = replica.layout.views(with_penalty - plain_gradient)
    np.testing.assert_allclose(difference[place], (T + 2) * kernel.numpy(), rtol=1e-4, atol=1e-5)
    assert sums.tolist() == plain_sums.tolist()  # what is reported is the loss of the text


def test_frozen_layers_stay_as_they_are():
    model = sequential(
        layers.Dense(4, trainable=False, name="frozen"), layers.BatchNormalization(trainable=False)
    )
    replica, (x, y) = replica_of(model), batch()
    assert replica.parameters == V * 4 + 4 * V + V
    before = [weight.copy() for weight in model.get_layer("frozen").get_weights()]
    replica.apply(replica.gradients(x, y, (0, 0))[0].copy(), 1.0)
    for old, new in zip(before, model.get_layer("frozen").get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_variable_that_is_not_used_has_a_gradient_of_zero():
    class Unused(layers.Layer):
        def build(self, input_shape):
            self.extra = self.add_weight(shape=(3,), name="extra")

        def call(self, x):
            return x

    model = sequential(Unused())
    gradient, _ = replica_of(model).gradients(*batch(), (0, 0))
    assert not gradient[V * 4 : V * 4 + 3].any()
    assert gradient.any()


def test_a_subclassed_model_is_built_on_the_way():
    class Bigram(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = layers.Embedding(V, V)

        def call(self, tokens):
            return self.table(tokens)

    model = Bigram()
    assert replica_of(model).parameters == V * V
    assert replica_of(model).gradients(*batch(), (0, 0))[1][1] == B * T


class Nested(keras.Model):
    """A BatchNormalization that is not at the top."""

    def __init__(self):
        super().__init__()
        self.inner = keras.Sequential(
            [layers.Embedding(V, V), layers.BatchNormalization(synchronized=True, name="norm")]
        )

    def call(self, tokens):
        return self.inner(tokens)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Nested, "'norm' is to be synchronized"),
        (lambda: sequential(layers.Dense(4, dtype="float16")), "is float16: only float32 can be trained"),
        (
            lambda: keras.Sequential([keras.Input((T,), dtype="int32"), layers.Identity()], name="mine"),
            "'mine' has no",
        ),
    ],
    ids=["nested batch norm", "float16", "nothing to train"],
)
def test_models_that_ranks_could_not_keep_equal(make, said):
    with pytest.raises(UsageError) as caught:
        replica_of(make())
    assert said in str(caught.value)
    assert caught.value.exit_code == 64
