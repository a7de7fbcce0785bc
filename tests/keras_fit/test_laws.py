"""Which code computes an objective, and what is compared before `fit`: in one process, without ranks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import UsageError
from tf_dist.keras_fit import fit_consistency, objective, whose_objective
from tf_dist.keras_fit.api import shard
from tf_dist.keras_fit.data_fingerprints import MOST_BYTES, digest
from tf_dist.keras_fit.dataset import inherited_sharding, sharding_of
from tf_dist.keras_fit.examples import tensors_of


def model(*layers, loss="mse", **more):
    made = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(2)])
    made.compile("sgd", loss=loss, **more)
    return made


class OfAUser(keras.layers.Layer):
    def call(self, x):
        return x - keras.ops.mean(x, axis=0)


class Stepping(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def of_a_user(y, p):
    return keras.ops.mean(keras.ops.square(y - p), axis=-1)


@pytest.mark.parametrize(
    ("made", "alone"),
    [
        (lambda: model(), True),
        (lambda: model(keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)), True),
        (lambda: model(loss=keras.losses.MeanSquaredError(reduction="sum")), True),
        (lambda: model(loss=keras.losses.mean_squared_error), True),
        (lambda: model(loss=of_a_user), False),
        (lambda: model(OfAUser()), False),
        (lambda: model(keras.layers.Lambda(lambda x: 2 * x)), False),
        (lambda: model(keras.layers.Dense(3, activity_regularizer="l2")), False),
    ],
)
def test_whose_code_computes_the_objective(made, alone):
    assert whose_objective.is_keras_alone(made()) is alone


def test_a_step_and_operations_between_rows_are_the_users():
    stepping = Stepping([keras.Input((4,)), keras.layers.Dense(2)])
    stepping.compile("sgd", loss="mse")
    assert not whose_objective.is_keras_alone(stepping)
    x = keras.Input((4,))
    between = keras.Model(x, keras.layers.Dense(2)(x - keras.ops.mean(x, axis=0)))
    between.compile("sgd", loss="mse")
    assert not whose_objective.is_keras_alone(between)


def test_rows_to_try_are_not_taken_for_a_list_of_outputs():
    two = model(loss=["mse", None])
    for ranks in (2, 3, 4):
        rows = objective._rows_to_try(two, ranks)
        assert 2 not in (rows, rows + 1, ranks * rows + 1)
    assert objective._rows_to_try(model(), 2) == objective.FEWEST


def test_facts_do_not_depend_on_names_or_on_float32():
    first, second = (model(keras.layers.Dense(3)) for _ in range(2))
    assert fit_consistency.facts_of(first) == fit_consistency.facts_of(second)
    second.optimizer.learning_rate = float(np.float32(0.01))
    assert fit_consistency.facts_of(first) == fit_consistency.facts_of(second)
    second.optimizer.learning_rate = 0.02
    changed = {
        k for k, v in fit_consistency.facts_of(second).items() if fit_consistency.facts_of(first)[k] != v
    }
    assert changed == {"optimizer learning_rate"}


def test_when_the_state_is_compared():
    assert [step for step in range(1, 301) if fit_consistency.is_due(step)] == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        100,
        200,
        300,
    ]


def test_paths_differ_in_the_numbers_that_keras_counts_only():
    ours = [["dense_1/kernel", "(2, 3) float32"], ["dense_2/kernel", "(2, 3) float32"]]
    renumbered = [["dense_4/kernel", "(2, 3) float32"], ["dense_5/kernel", "(2, 3) float32"]]
    assert fit_consistency._weights_differ(ours, renumbered) == ""
    assert "another order" in fit_consistency._weights_differ(ours, ours[::-1])
    assert "2 and 1 weights" in fit_consistency._weights_differ(ours, ours[:1])
    assert "(3, 3)" in fit_consistency._weights_differ(ours, [["dense_1/kernel", "(3, 3) float32"], ours[1]])


@pytest.mark.parametrize("place", [0, 12345, -1])
def test_digests_of_small_arrays_see_everything(place):
    array = np.zeros(20000, np.float32)
    other = array.copy()
    other[place] = 1
    assert digest([array]) != digest([other])
    assert digest([array.reshape(2, -1)]) != digest([array])


def test_digests_of_large_arrays_see_rows_spread_over_them():
    array = np.zeros((64, MOST_BYTES // 8), np.float32)
    assert digest([array]) != digest([array + 1])
    assert digest([np.array([b"a", b"b"], object)]) != digest([np.array([b"a", b"c"], object)])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (np.float32(1), "no rows"),
        (([[1, 2], [3]], [1, 2]), "ragged"),
        (tf.sparse.from_dense(np.eye(4)), "SparseTensor"),
        ({"a": np.ones(4), "b": 2.0}, r"x\['b'\].*no rows"),
    ],
)
def test_what_has_no_rows_of_one_shape_is_refused_by_name(data, match):
    with pytest.raises(UsageError, match=match):
        tensors_of(data)


def test_frames_lists_and_none():
    import pandas as pd

    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    assert tensors_of((frame, frame["a"]))[0].shape == (2, 2)
    assert isinstance(tensors_of(([np.ones(3), np.ones(3)], np.ones(3)))[0], tuple)
    assert tensors_of(["one", "two"]).dtype == tf.string
    assert len(tensors_of((np.ones(3), None))) == 1
    with pytest.raises(UsageError, match="several types"):
        tensors_of(pd.DataFrame({"a": [1.0], "b": ["x"]}))


def test_generators_yield_batches():
    pairs = ((np.ones((2, 3), np.float32), np.ones((2, 1), np.float32)) for _ in range(2))
    with pytest.raises(UsageError, match="leave out batch_size"):
        shard(pairs, SerialComm(), batch_size=2)
    assert sum(len(x) for x, _, _ in shard(pairs, SerialComm())) == 4


def test_a_dataset_made_from_one_of_shard_is_known():
    x = np.arange(6, dtype=np.float32)
    dataset = shard((x, x), SerialComm(), batch_size=2)
    assert sharding_of(dataset).weighted is True
    made = dataset.repeat().prefetch(1).take(3)
    assert sharding_of(made) is None and inherited_sharding(made) is sharding_of(dataset)
    assert inherited_sharding(tf.data.Dataset.range(3)) is None and inherited_sharding(x) is None
    seen = []

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(batch)

    one = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    one.compile("sgd", loss="mse")
    one.fit(shard((x[:, None], x), SerialComm(), batch_size=4), verbose=0, callbacks=[Note()])
    assert seen == [0, 1]
    with pytest.raises(UsageError, match="call shard\\(\\) last"):
        one.fit(shard((x[:, None], x), SerialComm()).map(lambda x, y, w: (x, y)), verbose=0)


def test_walks_of_a_dataset_are_not_begun_before_training():
    """Behind a cache a walk that is abandoned would cut what later walks see."""
    walks = []

    def rows():
        walks.append(1)
        yield from range(8)

    data = tf.data.Dataset.from_generator(rows, output_signature=tf.TensorSpec((), tf.int64)).cache()
    part = shard(data, SerialComm(), batch_size=4)
    assert not walks
    assert [len(batch) for batch in part] == [4, 4] == [len(batch) for batch in part]


def test_tokens_have_weights_of_two_axes():
    ids = np.ones((3, 5), np.int32)
    ((_, _, weight),) = shard((ids, ids), SerialComm(), batch_size=3)
    assert weight.shape == (3, 1)
    ((_, _, weight),) = shard((ids, ids.astype(np.float32)), SerialComm(), batch_size=3)
    assert weight.shape == (3,)


def test_drop_remainder():
    x = np.arange(10)
    assert [len(batch) for batch in shard(x, SerialComm(), batch_size=4, drop_remainder=True)] == [4, 4]
    dataset = tf.data.Dataset.range(10)
    assert [len(b) for b in shard(dataset, SerialComm(), batch_size=4, drop_remainder=True)] == [4, 4]


def test_a_thread_that_reads_data_draws_as_ever_while_a_step_is_tried():
    from concurrent.futures import ThreadPoolExecutor

    import tensorflow as tf

    from tf_dist.keras_fit import rank_randomness

    with rank_randomness.none(), ThreadPoolExecutor(1) as threads:
        here = [np.asarray(tf.random.uniform((4,))) for _ in range(2)]
        there = [np.asarray(threads.submit(tf.random.uniform, (4,)).result()) for _ in range(2)]
    assert (here[0] == here[1]).all()
    assert (there[0] != there[1]).any()
