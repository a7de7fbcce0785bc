"""What `distribute` refuses, in one process; what it does over ranks is in tests/mpi/test_fit_mpi.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import DataError, LaunchError, UsageError, behind, hide
from tf_dist.keras_fit import self_test
from tf_dist.keras_fit.api import distribute, shard


def test_a_keras_that_does_not_call_us_is_found_at_once(monkeypatch):
    """As Horovod's hook under Keras 3: another method is called in its stead."""

    def elsewhere(self, grads_and_vars):
        grads, variables = zip(*grads_and_vars, strict=True)
        return keras.optimizers.SGD.apply(self, grads, variables)

    monkeypatch.setattr(self_test, "_passed", set())
    monkeypatch.setattr(keras.optimizers.Optimizer, "apply_gradients", elsewhere)
    with pytest.raises(LaunchError, match=r"self-test.*does not call") as caught:
        distribute(keras.optimizers.Adam(), SerialComm())
    assert caught.value.exit_code == 78


def test_twice_or_nothing():
    optimizer = distribute(keras.optimizers.Adam(), SerialComm())
    with pytest.raises(UsageError, match="already"):
        distribute(optimizer, SerialComm())
    with pytest.raises(UsageError, match="takes a Keras optimizer"):
        distribute("adam", SerialComm())


def test_inside_xla():
    variable = keras.Variable([1.0])
    optimizer = distribute(keras.optimizers.SGD(), SerialComm())
    optimizer.build([variable])
    with pytest.raises(Exception, match="cannot be called inside jit_compile=True") as caught:
        tf.function(lambda: optimizer.apply([tf.ones(1)], [variable]), jit_compile=True)()
    assert type(behind(caught.value)) is UsageError


def raising(error):
    raise error


OURS = LaunchError("the ranks do not agree:\n  on two lines\n  or three")


def test_our_error_is_found_behind_one_of_autograph():
    @tf.function
    def traced():
        raising(OURS)

    with pytest.raises(Exception, match="the ranks do not agree") as caught:
        traced()
    assert caught.value is not OURS, "AutoGraph lets our errors through: behind() has less to do"
    assert behind(caught.value) is OURS


def test_our_error_is_found_behind_one_of_a_running_graph():
    @tf.function
    def running():
        return tf.numpy_function(lambda: raising(hide(OURS)), [], tf.float32)

    with pytest.raises(tf.errors.OpError) as caught:
        running()
    assert behind(caught.value) is OURS


def test_errors_of_others_stay_theirs():
    """Also where one of ours was hidden before, or was being handled meanwhile."""
    hide(OURS)
    of_tensorflow, of_a_user = tf.errors.InternalError(None, None, "out of luck"), ValueError(str(OURS))
    of_tensorflow.__context__ = OURS
    assert behind(of_tensorflow) is of_tensorflow
    assert behind(of_a_user) is of_a_user
    assert behind(OURS) is OURS


def test_shard_of_nothing():
    for nothing in (np.zeros((0, 3)), tf.data.Dataset.range(0).batch(4)):
        with pytest.raises(DataError):
            shard(nothing, SerialComm())


def test_shard_of_too_few_rows_for_an_evaluation():
    comm = SerialComm()
    comm.size, comm.allgather_obj = 3, lambda value, **_: [value] * 3
    for rows, batch in ((2, 8), (9, 2)):
        for data in (np.zeros((rows, 1)), tf.data.Dataset.range(rows)):
            with pytest.raises(DataError, match="too few for 3 ranks"):
                shard(data, comm, batch_size=batch, training=False)


def test_shard_keeps_the_form_of_the_data():
    x = {"a": np.arange(6.0), "b": np.arange(6)}
    (batch,) = shard(x, SerialComm(), shuffle=False)
    assert batch["a"].numpy().tolist() == x["a"].tolist()
    given = np.full((6, 2), 0.5, np.float32)
    ((_, _, weight),) = shard((x, x["a"], given), SerialComm())
    assert weight.numpy().tolist() == given.tolist()
