"""The objective of `model.fit` over N ranks is that of one process, whatever the loss, the data and the step.

The oracle is Keras alone with the same script: rank 0 trains for itself inside of ``independent()``.
Rows do not divide: the last batch has fewer than there are ranks at N = 3 and 4.
"""

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.errors import LaunchError, UsageError

pytestmark = pytest.mark.ranks(3)

N, T, V, G = 18, 6, 7, 8  # rows, tokens, vocabulary, global rows: batches of 8, 8 and 2
RNG = np.random.default_rng(3)
X = RNG.normal(size=(N, 4)).astype(np.float32)
Y = np.tanh(X @ RNG.normal(size=(4, 2))).astype(np.float32)
# Rows of very different lengths, so that halves of a batch have very different numbers of tokens.
IDS = RNG.integers(1, V, (N, T))
IDS[np.arange(T)[None] >= np.where(np.arange(N) % 8 < 4, 1, T)[:, None]] = 0
NEXT = (3 * IDS) % V
WEIGHTS = RNG.uniform(0.1, 3, N).astype(np.float32)


def dense(**more):
    import keras

    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, "tanh", **more), keras.layers.Dense(2)])


def language(mask):
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((T,), dtype="int32"),
            layers.Embedding(V, 4, mask_zero=mask),
            layers.LSTM(4, return_sequences=True),
            layers.Dense(V),
        ]
    )


def cross_entropy(**more):
    import keras

    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **more)


def masked_mean(y_true, y_pred):
    """One number, as TensorFlow's tutorials on text have it."""
    import tensorflow as tf

    losses = cross_entropy(reduction=None)(y_true, y_pred)
    mask = tf.cast(y_true != 0, losses.dtype)
    return tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)


def contrast(y_true, y_pred):
    """A value for each row that depends on all rows."""
    import keras
    import tensorflow as tf

    near = tf.matmul(y_pred, y_true, transpose_b=True)
    return keras.losses.sparse_categorical_crossentropy(tf.range(tf.shape(near)[0]), near, from_logits=True)


def keras_sum():
    import keras

    return keras.losses.MeanSquaredError(reduction="sum")


def two_outputs():
    import keras

    x = keras.Input((4,), name="x")
    h = keras.layers.Dense(5, activation="tanh")(x)
    return keras.Model(
        {"x": x}, {"a": keras.layers.Dense(2, name="a")(h), "b": keras.layers.Dense(1, name="b")(h)}
    )


def variational(scale):
    """`add_loss` of a mean (scale None) or of a sum over rows, beside the loss."""
    import keras

    class Penalty(keras.layers.Layer):
        def call(self, x):
            squares = keras.ops.square(x)
            self.add_loss(0.1 * keras.ops.mean(squares) if scale is None else scale * keras.ops.sum(squares))
            return x

    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(5), Penalty(), keras.layers.Dense(2)])


def penalized(normalize=False):
    """A penalty that vanishes with the weights of the first step, and adds up otherwise than the loss."""
    import keras

    class Penalized(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            return loss + 0.3 * keras.ops.mean(keras.ops.square(keras.ops.cast(y_pred, loss.dtype)))

    x = keras.Input((4,))
    h = keras.layers.Dense(5, activation="tanh")(x)
    h = keras.layers.BatchNormalization()(h) if normalize else h
    return Penalized(x, keras.layers.Dense(2, kernel_initializer="zeros")(h))


def stepping(reduce):
    """A ``train_step`` of one's own that takes two parts, as Keras's guide has it."""
    import keras
    import tensorflow as tf

    class Stepper(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = reduce(y, self(x, training=True))
            grads = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(grads, self.trainable_variables)
            return {"loss": loss}

    x = keras.Input((4,))
    return Stepper(x, keras.layers.Dense(2)(x))


def mean_of_squares(y, p):
    import tensorflow as tf

    return tf.reduce_mean(tf.square(y - p))


def sum_of_squares(y, p):
    import tensorflow as tf

    return 0.1 * tf.reduce_sum(tf.square(y - p))


def keras_loss(y, p):
    import keras

    return keras.losses.MeanSquaredError()(y, p)


def root_of_mean(y, p):
    return keras_loss(y, p) ** 0.5


def convolution():
    """Kernels that fail on no rows, with states of metrics that a row too many would change."""
    import keras

    layers = keras.layers
    inputs = [keras.Input((4,)), layers.Reshape((4, 1)), layers.Conv1D(3, 2), layers.LeakyReLU()]
    return keras.Sequential([*inputs, layers.BatchNormalization(), layers.Flatten(), layers.Dense(2)])


def positions():
    """Slices of rows (tokens) and of no row (positions), which Adam squares one by one."""
    import keras

    class Positions(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.table = keras.layers.Embedding(T, 4)

        def call(self, x):
            return x + self.table(keras.ops.arange(keras.ops.shape(x)[1]))

    tokens = keras.Input((T,), dtype="int32")
    x = Positions()(keras.layers.Embedding(V, 4)(tokens))
    return keras.Model(tokens, keras.layers.Dense(V)(x))


def normalized():
    import keras

    layers = keras.layers
    first = layers.BatchNormalization(momentum=0.5)
    return keras.Sequential(
        [keras.Input((4,)), first, layers.Dense(5), layers.BatchNormalization(), layers.Dense(2)]
    )


# name: model, arguments of compile, arguments of fit
CASES = {
    "mask_zero": lambda: (language(True), {"loss": cross_entropy()}, {"x": IDS, "y": NEXT}),
    "ignore_class": lambda: (language(False), {"loss": cross_entropy(ignore_class=0)}, {"x": IDS, "y": NEXT}),
    "per token": lambda: (
        language(False),
        {"loss": cross_entropy(), "metrics": ["accuracy"]},
        {"x": IDS, "y": NEXT, "sample_weight": RNG_WEIGHTS_NT},
    ),
    "sample weights": lambda: (dense(), {"loss": "mse"}, {"x": X, "y": Y, "sample_weight": WEIGHTS}),
    "weighted mean": lambda: (
        dense(),
        {"loss": mean_squares("mean_with_sample_weight")},
        {"x": X, "y": Y, "sample_weight": WEIGHTS},
    ),
    "class weights": lambda: (
        dense(),
        {"loss": cross_entropy(), "metrics": ["accuracy"]},
        {"x": X, "y": (Y[:, 0] > 0).astype(int), "class_weight": {0: 0.3, 1: 2.0}},
    ),
    "sum": lambda: (dense(), {"loss": mean_squares("sum")}, {"x": X, "y": Y}),
    "none": lambda: (dense(), {"loss": mean_squares(None)}, {"x": X, "y": Y}),
    "a masked mean": lambda: (language(False), {"loss": masked_mean}, {"x": IDS, "y": NEXT}),
    "between rows": lambda: (dense(), {"loss": contrast}, {"x": X, "y": Y}),
    "two outputs": lambda: (
        two_outputs(),
        {"loss": {"a": "mse", "b": "mae"}, "loss_weights": {"a": 1.0, "b": 0.3}, "metrics": {"a": ["mae"]}},
        {"x": {"x": X}, "y": {"a": Y, "b": Y[:, :1]}, "sample_weight": {"a": WEIGHTS, "b": WEIGHTS[::-1]}},
    ),
    "regularizers": lambda: (
        dense(kernel_regularizer="l2", activity_regularizer="l1"), {"loss": "mse"}, {"x": X, "y": Y},
    ),
    "add_loss mean": lambda: (variational(None), {"loss": "mse"}, {"x": X, "y": Y}),
    "add_loss sum": lambda: (variational(0.1), {"loss": "mse"}, {"x": X, "y": Y}),
    "a step's mean": lambda: (stepping(mean_of_squares), {}, {"x": X, "y": Y}),
    "a step's sum": lambda: (stepping(sum_of_squares), {}, {"x": X, "y": Y}),
    "a step's loss": lambda: (stepping(keras_loss), {}, {"x": X, "y": Y}),
    "a step's root": lambda: (stepping(root_of_mean), {}, {"x": X, "y": Y}),
    "a penalty": lambda: (penalized(), {"loss": "mse"}, {"x": X, "y": Y}),
    "a penalty on a sum": lambda: (
        penalized(normalize=True), {"loss": keras_sum(), "metrics": ["mae"]}, {"x": X, "y": Y},
    ),
    "across rows": lambda: (
        dense(), {"loss": "dice", "metrics": across_rows()}, {"x": X, "y": (Y > 0).astype("float32")},
    ),
    "batch norm": lambda: (normalized(), {"loss": "mse", "steps_per_execution": 2}, {"x": X, "y": Y}),
    "convolution": lambda: (
        convolution(), {"loss": "mse", "metrics": ["mae", f1()]}, {"x": X, "y": (Y > 0).astype("float32")},
    ),
    "positions": lambda: (positions(), {"loss": cross_entropy()}, {"x": IDS, "y": NEXT}),
    "F1": lambda: (dense(), {"loss": "mse", "metrics": [f1()]}, {"x": X, "y": (Y > 0).astype("float32")}),
    "metrics of the user": lambda: (
        language(mask=False), {"loss": cross_entropy(), "metrics": own_metrics()}, {"x": IDS, "y": NEXT},
    ),
    "eager metrics": lambda: (
        dense(),
        {"loss": "mse", "metrics": [nearest, largest_error()], "run_eagerly": True},
        {"x": X, "y": Y},
    ),
}  # fmt: skip
RNG_WEIGHTS_NT = RNG.uniform(0, 2, (N, T)).astype(np.float32)
# The logs of a train_step that returns what one rank has computed are a mean over ranks, not over rows.
LOCAL_LOGS = {"a step's mean", "a step's sum"}


def mean_squares(reduction):
    import keras

    return keras.losses.MeanSquaredError(reduction=reduction)


def f1():
    import keras

    return keras.metrics.F1Score(threshold=0.3)


def masked_accuracy(y_true, y_pred):
    """One number, as TensorFlow's tutorials on text have it."""
    import tensorflow as tf

    right = tf.cast(tf.argmax(y_pred, -1) == tf.cast(y_true, tf.int64), tf.float32)
    mask = tf.cast(y_true != 0, tf.float32)
    return tf.reduce_sum(right * mask) / tf.reduce_sum(mask)


def per_class(y_true, y_pred):
    """A value for each class and none for a row."""
    import tensorflow as tf

    return tf.reduce_max(tf.nn.softmax(y_pred), axis=(0, 1))


def nearest(y_true, y_pred):
    """A value for each row that depends on all rows."""
    import tensorflow as tf

    near = tf.matmul(y_pred, y_true, transpose_b=True)
    return tf.cast(tf.argmax(near, -1) == tf.range(tf.shape(near)[0], dtype=tf.int64), tf.float32)


def summed(y_true, y_pred):
    import keras

    return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)


summed.sums_over_ranks = True


def largest_error():
    """A metric of the user, whose state is no sum."""
    import keras

    class LargestError(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="largest")
            self.largest = self.add_weight(shape=(), initializer="zeros", name="largest")

        def update_state(self, y_true, y_pred, sample_weight=None):
            error = keras.ops.max(keras.ops.abs(y_true - y_pred))
            self.largest.assign(keras.ops.maximum(self.largest, error))

        def result(self):
            return keras.ops.convert_to_tensor(self.largest)

    return LargestError()


def across_rows():
    import keras

    return [keras.losses.dice, keras.losses.tversky]


def own_metrics():
    import keras

    class Right(keras.metrics.Mean):
        def update_state(self, y_true, y_pred, sample_weight=None):
            return super().update_state(masked_accuracy(y_true, y_pred))

    return [masked_accuracy, per_class, summed, Right(name="right")]


def trained(case, optimizer, seed):
    import keras

    keras.utils.set_random_seed(seed)
    model, compiled, data = CASES[case]()
    model.compile(optimizer, **compiled)
    validation = () if case.startswith("a step") else tuple(v for k, v in data.items() if k in ("x", "y"))
    keras.utils.set_random_seed(7)  # of the shuffle, alike on all ranks
    more = {"validation_data": validation} if validation else {}
    history = model.fit(**data, batch_size=G, epochs=2, verbose=0, **more)
    return [np.asarray(one.value) for one in model.weights], history.history


# Two ranks show every objective. With more, the last batch leaves some without a row: these tell. One rank
# is Keras by itself.
WITH_EMPTY_RANKS = [
    "mask_zero", "none", "a masked mean", "add_loss mean", "a step's mean", "batch norm", "convolution", "F1",
    "metrics of the user", "eager metrics", "a penalty", "a penalty on a sum",
    "across rows",
]  # fmt: skip
REPEATED = ["F1", "none", "a masked mean", "eager metrics", "a penalty"]  # by others of these
SHOWN = [
    pytest.param(case, marks=[pytest.mark.extended] * (case in REPEATED))
    for case in {1: ["mask_zero", "a step's mean"], 2: list(CASES)}.get(MPI.COMM_WORLD.size, WITH_EMPTY_RANKS)
]


def of_one_process(train):
    """What ``train()`` gives in Keras alone, on all ranks."""
    import tf_dist

    result = None
    if MPI.COMM_WORLD.rank == 0:
        with tf_dist.independent():
            result = train()
    return MPI.COMM_WORLD.bcast(result)


def near(found, expected, atol):
    """Weights are those that one process has."""
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("case", SHOWN)
def test_the_objective_is_that_of_one_process(connected, everyone, case):
    import keras

    import tf_dist

    def optimizer():
        adam = keras.optimizers.Adam(0.01, epsilon=1e-3)
        return adam if case == "positions" else keras.optimizers.SGD(0.1)

    expected, logs = of_one_process(lambda: trained(case, optimizer(), 1))
    found, found_logs = trained(case, tf_dist.distribute(optimizer(), connected), 1)
    near(found, expected, 1e-5)
    assert len(set(everyone(b"".join(one.tobytes() for one in found)))) == 1
    if case not in LOCAL_LOGS:
        for name, values in logs.items():
            np.testing.assert_allclose(found_logs[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_metrics_of_the_user_share_the_rows_of_all_ranks(connected, monkeypatch):
    """Targets and outputs are transferred once in a step, however many metrics want them."""
    import keras

    import tf_dist
    from tf_dist.keras_fit.gradient_reduction import Reduction

    gather, gathered = Reduction.gather_rows, []

    def counted(self, tensor, what):
        gathered.append(tensor.graph)
        return gather(self, tensor, what)

    monkeypatch.setattr(Reduction, "gather_rows", counted)
    model = dense()
    optimizer = tf_dist.distribute(keras.optimizers.SGD(0.1), connected)
    model.compile(optimizer, "mse", metrics=[nearest, largest_error()])
    model.fit(X, Y, batch_size=N, verbose=0)
    assert {gathered.count(graph) for graph in gathered} == {2}


@pytest.mark.parametrize(
    "policy", [pytest.param("mixed_float16", marks=pytest.mark.extended), "mixed_bfloat16"]
)
def test_a_step_of_the_user_in_half_precision_is_known(connected, everyone, policy):
    """What rounding makes of its gradients must not pass for another objective."""
    import keras

    import tf_dist

    def train(optimizer):
        keras.utils.set_random_seed(1)
        model = penalized()
        model.compile(optimizer, loss="mse")
        model.fit(X, Y, batch_size=G, epochs=1, shuffle=False, verbose=0)
        return [np.asarray(one.value) for one in model.weights]

    keras.config.set_dtype_policy(policy)
    try:
        expected = of_one_process(lambda: train(keras.optimizers.SGD(0.1)))
        found = train(tf_dist.distribute(keras.optimizers.SGD(0.1), connected))
    finally:
        keras.config.set_dtype_policy("float32")
    near(found, expected, 5e-3)
    assert len(set(everyone(b"".join(one.tobytes() for one in found)))) == 1


FORMS = ["arrays", "DataFrame", "dataset", "endless dataset", "PyDataset", "generator", "unknown length"]


def forms():
    """What `fit` takes, by name, as a function of no arguments, with further arguments of `fit`."""
    import keras
    import pandas as pd
    import tensorflow as tf

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return -(-N // G)

        def __getitem__(self, i):
            return X[i * G : i * G + G], Y[i * G : i * G + G]

    def generator():
        while True:
            for i in range(3):
                yield X[i * G : i * G + G], Y[i * G : i * G + G]

    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(G)
    return {
        "arrays": lambda: ({"x": X, "y": Y, "batch_size": G}, {}),
        "DataFrame": lambda: ({"x": pd.DataFrame(X), "y": pd.DataFrame(Y), "batch_size": G}, {}),
        "dataset": lambda: ({"x": batches}, {}),
        "endless dataset": lambda: ({"x": batches.repeat()}, {"steps_per_epoch": 3}),
        "PyDataset": lambda: ({"x": Batches()}, {}),
        "generator": lambda: ({"x": generator()}, {"steps_per_epoch": 3}),
        "unknown length": lambda: (
            {
                "x": tf.data.Dataset.from_generator(
                    lambda: iter(batches), output_signature=batches.element_spec
                )
            },
            {},
        ),
    }


# The others in tests/fuzz_fit as well.
FEW_FORMS = ("DataFrame", "PyDataset", "unknown length")
SHOWN_FORMS = [
    form if form in FEW_FORMS else pytest.param(form, marks=pytest.mark.extended) for form in FORMS
]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.ranks(2)  # rows that do not divide: above
@pytest.mark.parametrize("form", SHOWN_FORMS)
def test_the_form_of_the_data(connected, everyone, form):
    """Also by `shard`, where it takes that form."""
    import keras

    import tf_dist

    def run(optimizer, data, more):
        keras.utils.set_random_seed(1)
        model = dense()
        model.compile(optimizer, loss="mse", metrics=["mae"])
        history = model.fit(**data, **more, epochs=2, verbose=0, shuffle=False).history
        return [np.asarray(one.value) for one in model.weights], history

    def distributed():
        return tf_dist.distribute(keras.optimizers.SGD(0.1), connected)

    expected = of_one_process(lambda: run(keras.optimizers.SGD(0.1), *forms()[form]()))
    found = [run(distributed(), *forms()[form]())]
    data, more = forms()[form]()
    whole = (data["x"], data["y"]) if "y" in data else data["x"]
    shared = tf_dist.shard(whole, connected, batch_size=data.get("batch_size"), shuffle=False)
    found.append(run(distributed(), {"x": shared}, more))
    if form == "dataset":
        found.append(run(distributed(), {"x": shared.repeat()}, {"steps_per_epoch": 3}))
    for weights, logs in found:
        for one, other in zip(expected[0], weights, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
        assert logs == {name: pytest.approx(values, rel=1e-5) for name, values in expected[1].items()}


@pytest.mark.parametrize("optimizer", [pytest.param("SGD", marks=pytest.mark.extended), "Adam"])
def test_accumulated_gradients_of_a_step_of_the_user(connected, optimizer):
    """They cross inside of a branch, and the logs of the step after it, on all ranks in this order."""
    import keras

    import tf_dist

    def train(distribute):
        keras.utils.set_random_seed(1)
        model = stepping(mean_of_squares)
        model.compile(distribute(getattr(keras.optimizers, optimizer)(0.01, gradient_accumulation_steps=2)))
        history = model.fit(X, Y, batch_size=G, epochs=2, shuffle=False, verbose=0).history
        return [np.asarray(one.value) for one in model.weights], history

    expected = of_one_process(lambda: train(lambda plain: plain))
    found = train(lambda plain: tf_dist.distribute(plain, connected))
    near(found[0], expected[0], 1e-5)
    assert found[1] == {name: pytest.approx(values, rel=1e-5) for name, values in expected[1].items()}


def differing(kind, rank):
    """A model, its optimizer and data, of which something is another one on the last rank."""
    import keras

    other = rank == MPI.COMM_WORLD.size - 1 and rank > 0
    optimizer = keras.optimizers.Adam(0.01, beta_1=0.5 if other and kind == "beta" else 0.9)
    if kind == "schedule":
        optimizer = keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 9 if other else 10))
    if kind == "clipnorm":
        optimizer = keras.optimizers.SGD(0.1, clipnorm=0.1 if other else None)
    model = dense()
    if kind == "order":
        names = ["b", "a"] if other else ["a", "b"]
        x = keras.Input((4,))
        branches = {name: keras.layers.Dense(2, name=name)(x) for name in names}
        model = keras.Model(x, keras.layers.Add()([branches[name] for name in names]))
    if kind == "activation":
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, "relu" if other else "tanh")])
    if kind == "policy":
        model = dense(dtype="bfloat16" if other else "mixed_bfloat16")
    loss = "mae" if other and kind == "loss" else "mse"
    metrics = ["mape"] if other and kind == "metrics" else ["mae"]
    x = X + (1.0 if other and kind == "data" else 0.0)
    x = (
        np.concatenate([X[:-1], X[-1:] + (1.0 if other and kind == "last row" else 0.0)])
        if kind == "last row"
        else x
    )
    return model, optimizer, {"loss": loss, "metrics": metrics}, {"x": x, "y": Y}


EXPECTED = {
    "beta": "beta_1", "schedule": "learning_rate", "clipnorm": "clipnorm", "order": "another order|layer",
    "activation": "layer", "policy": "layer", "loss": "loss", "metrics": "metrics", "data": "same data",
    "last row": "same data",
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPECTED if MPI.COMM_WORLD.size <= 2 else ["beta", "last row"])
def test_ranks_that_differ_are_refused(connected, everyone, kind):
    import tf_dist

    model, optimizer, compiled, data = differing(kind, connected.rank)
    model.compile(tf_dist.distribute(optimizer, connected), **compiled)
    if connected.size == 1:
        model.fit(**data, batch_size=G, verbose=0)
        return
    with pytest.raises(LaunchError, match=EXPECTED[kind]) as caught:
        model.fit(**data, batch_size=G, verbose=0, shuffle=False)
    assert len(set(everyone(str(caught.value)))) == 1, "not one voice"


def test_a_callback_that_changes_weights_on_one_rank_is_noticed(connected, everyone):
    import keras

    import tf_dist

    class Meddle(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1 and connected.rank == 0:
                self.model.weights[2].assign_add(np.ones((5, 2)))

    model = dense()
    model.compile(tf_dist.distribute(keras.optimizers.SGD(0.1), connected), loss="mse")
    words = {"batch_size": G, "verbose": 0, "callbacks": [Meddle()]}
    if connected.size == 1:
        model.fit(X, Y, **words)
        return
    with pytest.raises(LaunchError, match=r"differ.*kernel"):
        model.fit(X, Y, **words)


def test_gradients_of_other_variables_are_not_averaged(connected, everyone):
    """One rank has a gradient of the first kernel alone, the others of the second, of one size."""
    import keras
    import tensorflow as tf

    import tf_dist

    a, b = keras.Variable(np.ones(3, np.float32), name="a"), keras.Variable(np.ones(3, np.float32), name="b")
    optimizer = tf_dist.distribute(keras.optimizers.SGD(0.1), connected)
    optimizer.build([a, b])
    grads = [tf.ones(3), None] if connected.rank == 0 else [None, tf.ones(3)]
    if connected.size == 1:
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            optimizer.apply(grads, [a, b])
        return
    with pytest.raises(LaunchError, match=r"gradients of a.*gradients of b"):
        optimizer.apply(grads, [a, b])


def test_an_objective_that_no_law_explains_is_refused(connected):
    """Each rank would compare its rows with each other, in a step of its own: before the first step."""
    import keras
    import tensorflow as tf

    import tf_dist

    def between(y, p):
        near = tf.matmul(p, y, transpose_b=True)
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(tf.range(tf.shape(near)[0]), near)
        )

    model = stepping(between)
    before = [np.asarray(one.value) for one in model.weights]
    model.compile(tf_dist.distribute(keras.optimizers.SGD(0.1), connected))
    if connected.size == 1:
        model.fit(X, Y, batch_size=G, verbose=0)
        return
    with pytest.raises(UsageError, match="not that of one process"):
        model.fit(X, Y, batch_size=G, verbose=0)
    before[0] = np.ascontiguousarray(before[0]).reshape(-1)
    connected.broadcast(before[0])
    assert (np.asarray(model.weights[0].value).reshape(-1) == before[0]).all()


def test_a_dry_run_leaves_metrics_as_they_were(connected, everyone):
    """Those that compile was given as objects have their variables before the model knows them."""
    import keras

    import tf_dist

    def run(optimizer):
        keras.utils.set_random_seed(1)
        model = dense(activity_regularizer="l2")  # tried before the first step
        recall = keras.metrics.Recall(thresholds=0.1, name="recall")
        model.compile(optimizer, loss="mse", metrics=[recall, "mae"])
        return model.fit(X, (Y > 0).astype("float32"), batch_size=G, verbose=0, shuffle=False).history

    expected = of_one_process(lambda: run(keras.optimizers.SGD(0.01)))
    found = run(tf_dist.distribute(keras.optimizers.SGD(0.01), connected))
    assert found == {name: pytest.approx(values, rel=1e-5) for name, values in expected.items()}


def test_a_small_term_that_adds_up_otherwise_is_not_taken_for_rounding(connected, everyone):
    """A user's penalty, whose mean is each rank's own, beside a loss of Keras's; ranks have other rows."""
    import keras

    import tf_dist

    class Penalized(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            return loss + 1e-3 * keras.ops.mean(keras.ops.square(y_pred))

    def run(optimizer):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4,))
        model = Penalized(inputs, keras.layers.Dense(2)(inputs))
        model.compile(optimizer, loss="mse")
        model.fit(X, 3 * Y, batch_size=N // 2, epochs=30, verbose=0, shuffle=False)
        return [np.asarray(one.value) for one in model.weights]

    expected = of_one_process(lambda: run(keras.optimizers.SGD(0.1)))
    found = run(tf_dist.distribute(keras.optimizers.SGD(0.1), connected))
    near(found, expected, 1e-6)


def test_two_outputs_and_as_many_rows_in_steps_of_several(connected, everyone):
    """Keras takes a target of two rows for a list of two, where it knows the rows: not those of a rank."""
    import keras

    import tf_dist

    def run(optimizer):
        keras.utils.set_random_seed(1)
        x = keras.Input((4,))
        outputs = [keras.layers.Dense(2, name="a")(x), keras.layers.Dense(1, name="b")(x)]
        model = keras.Model(x, outputs)
        model.compile(optimizer, loss=["mse", "mae"], steps_per_execution=2)
        rows = 2 * connected.size
        model.fit(
            X[: 2 * rows], [Y[: 2 * rows], Y[: 2 * rows, :1]], batch_size=rows, verbose=0, shuffle=False
        )
        return [np.asarray(one.value) for one in model.weights]

    expected = of_one_process(lambda: run(keras.optimizers.SGD(0.1)))
    found = run(tf_dist.distribute(keras.optimizers.SGD(0.1), connected))
    near(found, expected, 1e-6)


def test_a_dry_run_that_fails_on_one_rank_alone_holds_up_nobody(connected, everyone):
    """By the first law, losses of all rows meet weights of this rank's: one row fits any number of them."""
    import keras
    import tensorflow as tf

    import tf_dist

    class Weighted(keras.Model):
        def train_step(self, data):
            x, y, weight = data
            with tf.GradientTape() as tape:
                losses = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)(
                    y, self(x, training=True)
                )
                loss = tf.reduce_sum(losses * weight)
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"loss": loss}

    def run(optimizer):
        keras.utils.set_random_seed(1)
        tokens = keras.Input((T,), dtype="int32")
        model = Weighted(tokens, keras.layers.Dense(V)(keras.layers.Embedding(V, 4)(tokens)))
        model.compile(optimizer)
        weights = np.linspace(0.5, 1.5, N * T, dtype=np.float32).reshape(N, T)
        for _ in range(3):  # steps 1, 2, 4 ... compare data: all ranks must count alike
            model.fit(IDS, NEXT, sample_weight=weights, batch_size=G, verbose=0, shuffle=False)
        return [np.asarray(one.value) for one in model.weights]

    expected = of_one_process(lambda: run(keras.optimizers.SGD(0.01)))
    found = run(tf_dist.distribute(keras.optimizers.SGD(0.01), connected))
    near(found, expected, 1e-5)


def test_dropout_is_another_on_each_rank(connected, everyone):
    import keras
    import tensorflow as tf

    import tf_dist

    seen = []

    class Spy(keras.layers.Layer):
        def call(self, x):
            tf.numpy_function(lambda a: seen.append(a.tobytes()), [x], [])
            return x

    keras.utils.set_random_seed(1)
    layers = [keras.Input((24,)), keras.layers.Dropout(0.5), Spy(), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(tf_dist.distribute(keras.optimizers.SGD(0.1), connected), loss="mse")
    rows = 2 * connected.size
    model.fit(np.ones((rows, 24), np.float32), np.ones((rows, 1), np.float32), batch_size=rows, verbose=0)
    assert len(set(everyone(seen[-1]))) == connected.size
    generators = [v for v in model.variables if "seed" in v.path]
    assert len(set(everyone(repr([v.numpy().tolist() for v in generators])))) == 1
