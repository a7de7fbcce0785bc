"""What `model.fit` keeps from one batch to the next, besides weights: states of layers, and generators."""

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
