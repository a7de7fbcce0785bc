"""What `model.fit` keeps from a batch to the next, what a step does with gradients, and what it returns."""

import time

import numpy as np
import pytest

from tf_dist.errors import UsageError

pytestmark = pytest.mark.ranks(2)

X = np.random.default_rng(3).normal(size=(24, 4)).astype(np.float32)
Y = X[:, :1] - X[:, 1:2]
G = 8


def layer_of(change):
    """A layer with a weight that ``change(weight, x)`` gives its next value."""
    import keras

    class Keeps(keras.layers.Layer):
        def build(self, shape):
            self.kept = self.add_weight(shape=(8, 4), initializer="zeros", trainable=False, name="kept")

        def call(self, x):
            self.kept.assign(change(self.kept, x))
            return x

    return Keeps()


def compiled(*layers, comm):
    import keras

    import tf_dist

    keras.utils.set_random_seed(1)
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile(tf_dist.distribute(keras.optimizers.SGD(0.1), comm), loss="mse")
    return model


def counted(kept, x):
    """The same number on each rank, and half of what one process counts."""
    import keras

    return kept + keras.ops.cast(keras.ops.shape(x)[0], "float32")


def averaged(kept, x):
    import keras

    return 0.9 * kept + 0.1 * keras.ops.mean(x, axis=0)


def queued(kept, x):
    import keras

    return keras.ops.concatenate([x, kept])[:8]


@pytest.mark.parametrize("change", [counted, averaged, queued])
def test_a_state_of_each_rank_s_own_rows_is_refused(connected, change):
    """Also where ranks have equal numbers, which no comparison of ranks finds; before the first step."""
    import keras

    model = compiled(keras.Input((4,)), layer_of(change), comm=connected)
    with pytest.raises(UsageError, match=r"changes .*kept by itself"):
        model.fit(X, Y, batch_size=G, verbose=0)
    assert not np.asarray(model.weights[0].value).any()
    assert int(model.optimizer.iterations) == 0


def test_a_state_that_knows_no_rows_is_kept(connected, everyone):
    import keras

    model = compiled(keras.Input((4,)), layer_of(lambda kept, x: kept + 1.0), comm=connected)
    model.fit(X, Y, batch_size=G, epochs=2, verbose=0)
    assert (np.asarray(model.weights[0].value) == 6).all()
    assert len(set(everyone(np.asarray(model.weights[1].value).tobytes()))) == 1


def test_a_stateful_layer_is_refused(connected):
    import keras

    sequences = X.reshape(24, 2, 2)
    recurrent = keras.layers.LSTM(3, stateful=True, name="recurrent")
    model = compiled(keras.Input(batch_shape=(G, 2, 2)), recurrent, comm=connected)
    with pytest.raises(UsageError, match="'recurrent' has stateful=True"):
        model.fit(sequences, Y, batch_size=G, shuffle=False, verbose=0)


def test_a_generator_is_read_as_far_as_is_trained(connected, everyone):
    """TensorFlow reads ahead. The next `fit` goes on with the rest."""
    import keras

    given = []

    def batches(note):
        at = 0
        while True:
            time.sleep(0.002 * connected.rank)
            note(at)
            yield X[at : at + 4], Y[at : at + 4]
            at = (at + 4) % 24

    model = compiled(keras.Input((4,)), comm=connected)
    training, validation = batches(given.append), batches(lambda _: None)
    histories = [
        model.fit(
            training, steps_per_epoch=3, epochs=2 * number, initial_epoch=2 * number - 2,
            validation_data=validation, validation_steps=3, shuffle=False, verbose=0,
        ).history
        for number in (1, 2)
    ]  # fmt: skip
    assert len(given) == 12
    assert [len(history["val_loss"]) for history in histories] == [2, 2]
    assert everyone(histories) == [histories] * connected.size


def stepping(step, comm):
    """A model with a train_step: ``step(model, gradients, loss, y)`` applies them, and returns logs."""
    import keras
    import tensorflow as tf

    import tf_dist

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)
            self.tracker = keras.metrics.Mean(name="loss")

        def call(self, x):
            return self.dense(x)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = keras.ops.mean((self(x, training=True) - y) ** 2)
            logs = step(self, tape.gradient(loss, self.trainable_variables), loss, y)
            self.tracker.update_state(loss)
            return {"loss": self.tracker.result()} | (logs or {})

    keras.utils.set_random_seed(1)
    model = Model()
    model.compile(tf_dist.distribute(keras.optimizers.SGD(0.01), comm))
    return model


def apply(model, gradients):
    model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))


def clipped(model, gradients, loss, y):
    import tensorflow as tf

    apply(model, tf.clip_by_global_norm(gradients, 50.0)[0])


def skipped(model, gradients, loss, y):
    import tensorflow as tf

    norm = tf.linalg.global_norm(gradients)
    apply(model, [tf.where(norm < 50.0, one, tf.zeros_like(one)) for one in gradients])


def shrunk(model, gradients, loss, y):
    apply(model, [0.5 * one + 0.01 * w for one, w in zip(gradients, model.trainable_variables, strict=True)])


def by_hand(model, gradients, loss, y):
    apply(model, gradients)
    model.trainable_variables[0].assign_sub(1e-3 * gradients[0])


def rate_by_loss(model, gradients, loss, y):
    model.optimizer.learning_rate.assign(0.01 / (1 + loss))
    apply(model, gradients)


@pytest.mark.parametrize(
    ("step", "words"),
    [(clipped, "clips"), (skipped, "clips"), (by_hand, "kernel by itself"), (rate_by_loss, "learning_rate")],
)
def test_what_each_rank_would_do_to_its_own_gradients(connected, step, words):
    """Also what no gradient of the first rows is large enough for."""
    model = stepping(step, connected)
    with pytest.raises(UsageError, match=words):
        model.fit(X, Y, batch_size=G, verbose=0)
    assert int(model.optimizer.iterations) == 0


def test_gradients_may_be_scaled_and_decayed(connected, everyone):
    import tf_dist

    def train(comm):
        model = stepping(shrunk, comm)
        model.fit(X, Y, batch_size=G, epochs=2, shuffle=False, verbose=0)
        return np.asarray(model.dense.kernel.value)

    found = train(connected)
    if connected.rank == 0:
        from tf_dist.comm.transport.base import SerialComm

        with tf_dist.independent():
            np.testing.assert_allclose(found, train(SerialComm()), rtol=1e-5)
    assert len(set(everyone(found.tobytes()))) == 1


def test_logs_are_means_or_sums_over_rows(connected, told):
    import keras

    def step(model, gradients, loss, y):
        apply(model, gradients)
        ops = keras.ops
        return {
            "rows": ops.shape(y)[0],
            "sum": ops.sum(y),
            "mean": ops.mean(y),
            "two": 2.0,
            "most": ops.max(y),
        }

    logs = stepping(step, connected).fit(X, Y, batch_size=G, shuffle=False, verbose=0).history
    last = Y[-G:]
    assert logs["rows"] == [G]
    np.testing.assert_allclose([logs["sum"][0], logs["mean"][0]], [last.sum(), last.mean()], rtol=1e-5)
    assert logs["two"] == [2.0]
    if connected.rank == 0:
        assert sum("most is neither a mean nor a sum" in message for message in told.messages) == 1


def test_a_generator_that_draws_while_a_step_is_tried(connected, everyone):
    """The dry run puts nothing back that the thread which reads the data has drawn meanwhile."""

    def batches():
        while True:
            time.sleep(0.01 + 0.02 * connected.rank)
            x = np.random.normal(size=(G, 4)).astype(np.float32)
            yield x, x[:, :1]

    def slowly(model, gradients, loss, y):
        time.sleep(0.1)
        apply(model, gradients)

    model = stepping(slowly, connected)
    history = model.fit(batches(), steps_per_epoch=12, epochs=2, shuffle=False, verbose=0).history
    assert everyone(history) == [history] * connected.size
