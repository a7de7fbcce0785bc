"""`model.fit` over real ranks equals `model.fit` on one rank with the global batch.

Each rank computes the serial training for itself, with a plain optimizer. Keras is imported inside
functions: ``connected`` comes first, as in a user's script.
"""

import zipfile

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError, UsageError

pytestmark = pytest.mark.ranks(2)

N, F, G, EPOCHS = 35, 4, 12, 2  # examples, features, global rows; the last batch has 11 rows
RNG = np.random.default_rng(5)
X = RNG.normal(size=(N, F)).astype(np.float32)
Y = np.tanh(X @ RNG.normal(size=(F, 2))).astype(np.float32)


def functional(seed=1):
    import keras

    keras.utils.set_random_seed(seed)
    x = keras.Input((F,))
    return keras.Model(x, keras.layers.Dense(2)(keras.layers.Dense(5, activation="tanh")(x)))


def subclassed(seed=1):
    import keras

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(5, activation="tanh")
            self.out = keras.layers.Dense(2)

        def call(self, x):
            return self.out(self.hidden(x))

    keras.utils.set_random_seed(seed)
    return Net()


def own_step(seed=1):
    import keras
    import tensorflow as tf

    class Stepper(keras.Model):
        def train_step(self, data):
            x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True), weight)
            variables = self.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
            return {"loss": loss}

    keras.utils.set_random_seed(seed)
    x = keras.Input((F,))
    return Stepper(x, keras.layers.Dense(2)(keras.layers.Dense(5, activation="tanh")(x)))


def embedding(seed=1):
    import keras

    keras.utils.set_random_seed(seed)
    x = keras.Input((F,))
    ids = keras.ops.cast(keras.ops.clip(x * 2 + 4, 0, 7), "int32")
    return keras.Model(x, keras.layers.Dense(2)(keras.layers.Flatten()(keras.layers.Embedding(8, 3)(ids))))


MODELS = {"functional": functional, "subclassed": subclassed, "train_step": own_step, "embedding": embedding}


def adam(**more):
    import keras

    return keras.optimizers.Adam(1e-2, **more)


def scheduled(**more):
    import keras

    return keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.3, 5), momentum=0.9, **more)


OPTIMIZERS = {
    "sgd": lambda: scheduled(),
    "clipnorm": lambda: scheduled(clipnorm=0.1),
    "global_clipnorm": lambda: scheduled(global_clipnorm=0.1),
    "ema": lambda: adam(use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=2),
    "accumulation": lambda: adam(gradient_accumulation_steps=2, global_clipnorm=0.1),
    "loss_scale_factor": lambda: adam(loss_scale_factor=128.0, weight_decay=0.1),
}


def weights(model):
    return np.concatenate([np.asarray(variable.value).ravel() for variable in model.weights])


def fit(model, optimizer, data, **more):
    model.compile(optimizer, loss="mse", **more)
    return model.fit(data, epochs=EPOCHS, verbose=0, shuffle=False)


def serial(build, optimizer):
    from tf_dist.keras_fit.api import shard

    model = build()
    fit(model, optimizer, shard((X, Y), SerialComm(), batch_size=G))
    return weights(model)


def parallel(build, optimizer, comm, **more):
    import tf_dist

    model = build(1 + comm.rank)  # every rank begins elsewhere
    fit(model, tf_dist.distribute(optimizer, comm), tf_dist.shard((X, Y), comm, batch_size=G), **more)
    return model


def check(found, expected, everyone, limit=1e-5):
    assert len(set(everyone(found.tobytes()))) == 1, "the ranks have different weights"
    assert max(everyone(float(np.abs(found - expected).max()))) <= limit


# What differs with more ranks is who has which examples: `test_every_example_once`.
up_to_two = pytest.mark.skipif(MPI.COMM_WORLD.size > 2, reason="one and two ranks show it")


def but_for(shown, names):
    """All names, those marked `extended` that are drawn by tests/jobs/test_fuzz_fit.py as well."""
    return [name if name in shown else pytest.param(name, marks=pytest.mark.extended) for name in names]


@up_to_two
@pytest.mark.parametrize("name", but_for(("embedding",), MODELS))
def test_models(connected, everyone, name):
    found = weights(parallel(MODELS[name], adam(), connected))
    # Also of an id that a batch repeats: Keras's Adam squares its gradients one by one, not their sum.
    check(found, serial(MODELS[name], adam()), everyone)


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_fit_of_plain_arrays(connected, everyone, steps_per_execution):
    """The oracle is what a user has today: `fit(x, y)` in one process, without anything of ours."""
    import tf_dist

    alone = functional()
    alone.compile(scheduled(), loss="mse")
    with tf_dist.independent():
        alone.fit(X, Y, batch_size=G, epochs=EPOCHS, shuffle=False, verbose=0)
    model = functional(1 + connected.rank)
    data = tf_dist.shard((X, Y), connected, batch_size=G, shuffle=False)
    fit(model, tf_dist.distribute(scheduled(), connected), data, steps_per_execution=steps_per_execution)
    check(weights(model), weights(alone), everyone, 1e-6)


def test_train_on_batch(connected, everyone):
    import tf_dist

    alone, model = functional(), functional(1 + connected.rank)
    alone.compile(scheduled(), loss="mse")
    model.compile(tf_dist.distribute(scheduled(), connected), loss="mse")
    for batch in tf_dist.shard((X, Y), SerialComm(), batch_size=G):
        alone.train_on_batch(*batch)
    for batch in tf_dist.shard((X, Y), connected, batch_size=G):
        model.train_on_batch(*batch)
    check(weights(model), weights(alone), everyone, 1e-6)


def test_a_multi_optimizer(connected, everyone):
    import keras

    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has no MultiOptimizer")

    def several():
        kinds = {".*kernel": keras.optimizers.SGD(0.1), ".*bias": keras.optimizers.Adam(0.01)}
        default = keras.optimizers.SGD(0.1)
        return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(default, kinds))

    check(weights(parallel(functional, several(), connected)), serial(functional, several()), everyone)


def test_a_step_that_does_not_call_us_is_refused(connected):
    """A ``train_step`` that updates the weights by itself."""
    import keras

    import tf_dist

    class Own(keras.Model):
        def train_step(self, data):
            for variable in self.trainable_variables:
                variable.assign(variable * 0.9)
            return {"loss": keras.ops.zeros(())}

    x = keras.Input((F,))
    model = Own(x, keras.layers.Dense(2)(x))
    model.compile(tf_dist.distribute(adam(), connected), loss="mse")
    with pytest.raises(LaunchError, match="did not call the distributed optimizer"):
        model.fit(tf_dist.shard((X, Y), connected, batch_size=G), verbose=0, shuffle=False)


@up_to_two
@pytest.mark.parametrize("name", but_for(("clipnorm", "loss_scale_factor"), OPTIMIZERS))
def test_optimizers(connected, everyone, name):
    found = weights(parallel(functional, OPTIMIZERS[name](), connected))
    check(found, serial(functional, OPTIMIZERS[name]()), everyone, 1e-5 if "adam" in name else 1e-6)


def test_backends(carried, everyone):
    check(
        weights(parallel(functional, scheduled(), carried)), serial(functional, scheduled()), everyone, 1e-6
    )


def test_the_ranks_talk_once_for_an_accumulated_gradient(connected):
    steps = EPOCHS * -(-N // G)
    calls = []
    for optimizer in (adam(), adam(gradient_accumulation_steps=3)):
        before = connected.calls
        parallel(functional, optimizer, connected)
        calls.append(connected.calls - before)
    gradients = (steps, steps // 3)
    compared = [
        count.bit_length() for count in gradients
    ]  # data, after the first, second, fourth ... of them
    # A roll call and a gradient; lengths and digests of what was read.
    assert calls[0] - calls[1] == 2 * (gradients[0] - gradients[1]) + 2 * (compared[0] - compared[1])


@pytest.mark.parametrize("graph", [True, False])
def test_a_loop_of_ones_own(connected, everyone, graph):
    import keras
    import tensorflow as tf

    import tf_dist

    loss_of = keras.losses.MeanSquaredError()

    def train(model, optimizer, comm, seed):
        def step(x, y, weight):
            with tf.GradientTape() as tape:
                loss = loss_of(y, model(x, training=True), weight)
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        step = tf.function(step) if graph else step
        for batch in tf_dist.shard((X, Y), comm, batch_size=G, seed=seed):
            step(*batch)
        return weights(model)

    expected = train(functional(), scheduled(), SerialComm(), 7)
    model = functional(1 + connected.rank)
    optimizer = tf_dist.distribute(scheduled(), connected)
    optimizer.build(model.trainable_variables)
    check(train(model, optimizer, connected, 7), expected, everyone, 1e-6)


def test_first_gradients_of_other_weights_are_refused(connected, everyone):
    import tensorflow as tf

    import tf_dist

    model = functional(1 + connected.rank)
    optimizer = tf_dist.distribute(scheduled(), connected)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(X))
    gradients = tape.gradient(loss, model.trainable_variables)
    try:
        optimizer.apply(gradients, model.trainable_variables)
        said = "nothing"
    except UsageError as error:
        said = str(error)
    expected = "nothing" if connected.size == 1 else "Call optimizer.build"
    assert all(expected in word for word in everyone(said))


@pytest.mark.parametrize("outer", [False, True], ids=["keras_scales", "we_scale"])
def test_mixed_float16_and_an_overflow_on_one_rank(connected, everyone, outer):
    """The step is skipped by all ranks, and all halve their scale; then training goes on."""
    import keras
    import tensorflow as tf

    import tf_dist

    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = functional(1 + connected.rank)
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = scheduled()
    if outer:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(tf_dist.distribute(optimizer, connected), loss="mse")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    x = np.ones((4, F), np.float32)

    def fit_mine(targets):
        mine = tf.data.Dataset.from_tensor_slices((x, targets)).batch(4)
        model.fit(tf_dist.shard(mine, connected, sharded=True), verbose=0)

    fit_mine(x[:, :2])
    before, scale = weights(model), float(model.optimizer.dynamic_scale.numpy())
    # A loss of float32 is still finite here, and its gradient in float16 is not.
    bad = x * 1e15 if connected.rank == connected.size - 1 else x
    fit_mine(bad[:, :2])
    assert all(everyone(bool((weights(model) == before).all())))
    assert everyone(float(model.optimizer.dynamic_scale.numpy())) == [scale / 2] * connected.size
    fit_mine(x[:, :2])
    assert len(set(everyone(weights(model).tobytes()))) == 1
    assert (weights(model) != before).any()


def test_jit_compile(connected, everyone, told):
    found = weights(parallel(functional, scheduled(), connected, jit_compile=True))
    check(found, serial(functional, scheduled()), everyone, 1e-6)
    # One rank exchanges nothing, so XLA may compile its whole step.
    assert any("without XLA" in line for line in told.messages) == (connected.size > 1)


def test_a_file_knows_nothing_of_us(connected, everyone, tmp_path):
    import keras

    import tf_dist

    model = parallel(functional, adam(), connected)
    path = tmp_path / "model.keras"
    model.save(path)
    with zipfile.ZipFile(path) as file:
        text = file.read("config.json").decode()
    assert "tf_dist" not in text and "Distributed" not in text
    loaded = keras.saving.load_model(path)
    assert type(loaded.optimizer) is keras.optimizers.Adam
    assert (weights(loaded) == weights(model)).all()
    # Distributed again, it goes on as the first one does, with Adam's moments.
    loaded.compile(tf_dist.distribute(loaded.optimizer, connected), loss="mse")
    data = tf_dist.shard((X, Y), connected, batch_size=G, seed=3)
    loaded.fit(data, verbose=0, shuffle=False)
    model.fit(tf_dist.shard((X, Y), connected, batch_size=G, seed=3), verbose=0, shuffle=False)
    check(weights(loaded), weights(model), everyone, 0)


def test_different_numbers_of_steps_end_with_a_message(connected, everyone):
    import tensorflow as tf

    import tf_dist

    model = functional()
    model.compile(tf_dist.distribute(adam(), connected), loss="mse")
    rows = 4 * (3 + (connected.rank == connected.size - 1))
    mine = tf.data.Dataset.from_tensor_slices((X[:rows], Y[:rows])).batch(4)
    try:
        model.fit(tf_dist.shard(mine, connected, sharded=True), verbose=0)
        said = "nothing"
    except LaunchError as error:
        said = str(error)
    expected = "nothing" if connected.size == 1 else "different numbers of steps"
    assert all(expected in word for word in everyone(said))


@pytest.mark.parametrize("kind", ["arrays", "examples", "batches"])
@pytest.mark.parametrize("extra", [-2, -1, 0, 1, 2])
def test_every_example_once(connected, everyone, kind, extra):
    """Of N examples over R ranks, whatever N: by weight, and with equally many steps on all."""
    import tensorflow as tf

    import tf_dist

    for count in (max(1, connected.size + extra), 3 * connected.size + extra):
        x = np.arange(count, dtype=np.float32)
        data = (x, x)
        if kind != "arrays":
            data = tf.data.Dataset.from_tensor_slices(data)
        if kind == "batches":
            data = data.batch(4)
        found = list(
            tf_dist.shard(data, connected, batch_size=None if kind == "batches" else 4).as_numpy_iterator()
        )
        assert len(set(everyone(len(found)))) == 1
        mine = [float(value) for x, _, w in found for value, weight in zip(x, w, strict=True) if weight]
        seen = [value for part in everyone(mine) for value in part]
        assert sorted(seen) == x.tolist()
        total = sum(everyone(sum(float(w.sum() / len(w)) for _, _, w in found)))
        assert total == pytest.approx(connected.size * len(found))


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras's, of a dataset of unknown length
@pytest.mark.parametrize("kind", ["arrays", "examples", "batches"])
def test_an_evaluation_is_that_of_one_process(connected, everyone, kind):
    """Batches of 7 divide by no number of ranks; the last one has 3 rows, so that rank 3 has none of it."""
    import keras
    import tensorflow as tf

    import tf_dist

    x, y = X[:31], Y[:31]
    model = functional()
    model.compile(tf_dist.distribute(scheduled(), connected), loss="mse", metrics=["mae"])
    alone = keras.callbacks.CallbackList([])  # without a model: Keras's own, of this rank
    expected = model.evaluate(x, y, batch_size=7, verbose=0, return_dict=True, callbacks=alone)
    data = (x, y) if kind == "arrays" else tf.data.Dataset.from_tensor_slices((x, y))
    data = data.batch(7) if kind == "batches" else data
    data = tf_dist.shard(data, connected, batch_size=None if kind == "batches" else 7, training=False)
    assert model.evaluate(data, verbose=0, return_dict=True) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sharded", [True, False])
def test_datasets_in_different_orders_are_refused(connected, everyone, sharded):
    import tensorflow as tf

    import tf_dist

    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(50, seed=connected.rank).batch(10)
    model = functional()
    model.compile(tf_dist.distribute(adam(), connected), loss="mse")
    try:
        model.fit(tf_dist.shard(data, connected) if sharded else data, verbose=0, shuffle=False)
        said = "nothing"
    except LaunchError as error:
        said = str(error)
    expected = "nothing" if connected.size == 1 else "give shuffle() a seed"
    assert all(expected in word for word in everyone(said))


def test_class_weight(connected, everyone):
    """Keras takes class weights or sample weights, and `shard` gives the latter unless it is told not to."""
    import tf_dist

    classes = np.eye(2, dtype=np.float32)[(X[:24].sum(1) > 0).astype(int)]

    def train(optimizer, comm, seed):
        model = functional(seed)
        model.compile(optimizer, loss="mse", run_eagerly=True)
        data = tf_dist.shard((X[:24], classes), comm, batch_size=G, weights=False)
        model.fit(data, epochs=EPOCHS, verbose=0, shuffle=False, class_weight={0: 0.25, 1: 3.0})
        return weights(model)

    found = train(tf_dist.distribute(scheduled(), connected), connected, 1 + connected.rank)
    check(found, train(scheduled(), SerialComm(), 1), everyone, 1e-6)


def test_validation_split_and_initial_epoch(connected, everyone):
    """Keras splits off the end of the arrays; training and validation share out the rows of each part."""
    import tf_dist

    def run(optimizer, seed):
        model = functional(seed)
        model.compile(optimizer, loss="mse", run_eagerly=True)
        return model.fit(
            X, Y, batch_size=3, epochs=4, initial_epoch=2, validation_split=0.25, verbose=0, shuffle=False
        )

    found = run(tf_dist.distribute(scheduled(), connected), 1 + connected.rank)
    with tf_dist.independent():
        expected = run(scheduled(), 1)
    assert found.epoch == [2, 3]
    assert everyone(found.history) == [found.history] * connected.size
    for name, values in expected.history.items():
        assert found.history[name] == pytest.approx(values, rel=1e-5)


def test_evaluate_is_for_all_and_predict_for_one(connected, everyone, capsys):
    """Results are those of all rows; a prediction is this rank's own, and one bar is drawn, by rank 0."""
    import keras

    import tf_dist

    model = functional(1)
    model.compile(tf_dist.distribute(scheduled(), connected), loss="mse", metrics=["mae"], run_eagerly=True)
    x, y = X[:24], Y[:24]  # rows that divide by the ranks: else weights of `shard` are in the loss, too
    data = tf_dist.shard((x, y), connected, batch_size=G, shuffle=False)
    bars = []
    capsys.readouterr()
    loss = model.fit(data, verbose=1, shuffle=False).history["loss"][0]
    bars.append(capsys.readouterr().out)
    found = model.evaluate(data, verbose=1, return_dict=True)
    bars.append(capsys.readouterr().out)
    assert everyone(found) == [found] * connected.size
    alone = keras.callbacks.CallbackList([])
    expected = model.evaluate(x, y, verbose=0, callbacks=alone, return_dict=True)
    assert found == pytest.approx(expected, rel=1e-5)
    calls, noted = connected.calls, []
    if connected.rank == 0:  # as nobody else does
        note = keras.callbacks.LambdaCallback(on_predict_end=lambda logs: noted.append(True))
        # In one batch: kernels round batches of other sizes differently.
        mine = model.predict(X, batch_size=len(X), verbose=0, callbacks=[note])
        np.testing.assert_array_equal(mine, model.predict_on_batch(X))
    capsys.readouterr()
    model.predict(X[: 1 + connected.rank], verbose=1)
    bars.append(capsys.readouterr().out)
    assert connected.calls == calls and len(noted) == (connected.rank == 0)
    if connected.rank == 0:  # the last numbers are those of all ranks
        assert (
            f"loss: {loss:.4f}" in bars[0] and f"loss: {found['loss']:.4f}" in bars[1] and "step" in bars[2]
        )
    else:
        assert bars == ["", "", ""]
