"""Whose list of callbacks Keras makes, and who writes. Over ranks: tests/mpi/test_callbacks_mpi.py."""

import keras
import numpy as np
import pytest
from keras.src.backend.tensorflow import trainer as keras_trainer

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError
from tf_dist.keras_callbacks.callback_list import RankCallbackList, is_writer
from tf_dist.keras_fit.api import distribute
from tf_dist.keras_fit.fit_callbacks import FitCallbackList, install
from tf_dist.keras_fit.optimizers_of import comm_of

KERAS_LIST = keras.callbacks.CallbackList
k = keras.callbacks


class RankOne(SerialComm):
    """Rank 1 of two, whose partner does what it does."""

    rank, size = 1, 2

    def _allreduce(self, array):
        array *= 2

    def _allgather_bytes(self, raw):
        return [raw, raw]


@pytest.fixture(autouse=True)
def installed():
    install()


def model_of(optimizer):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", run_eagerly=True)
    return model


def distributed():
    return model_of(distribute(keras.optimizers.SGD(), SerialComm()))


# Which list ---------------------------------------------------------------------------------------


def lists_made(model):
    """The classes of the lists that fit, evaluate and predict make, without their being told."""
    kinds = []

    class Note(k.Callback):
        def set_params(self, params):
            kinds.append(type(params["of"]))

    original = KERAS_LIST.set_params
    x = np.ones((2, 2), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KERAS_LIST, "set_params", lambda self, params: original(self, {**params, "of": self}))
        model.fit(x, x[:, :1], verbose=0, callbacks=[Note()])
        model.evaluate(x, x[:, :1], verbose=0, callbacks=[Note()])
        model.predict(x, verbose=0, callbacks=[Note()])
    return kinds


def test_a_plain_model_gets_the_list_of_keras():
    assert lists_made(model_of(keras.optimizers.SGD())) == [KERAS_LIST] * 3
    assert type(k.CallbackList()) is KERAS_LIST


def test_a_distributed_model_gets_ours():
    model = distributed()
    assert lists_made(model) == [FitCallbackList] * 3
    made = k.CallbackList([], False, False, model)  # by place, as well as by name
    assert type(made) is FitCallbackList and isinstance(made, KERAS_LIST)


def test_subclasses_stay_theirs():
    class Mine(k.CallbackList):
        pass

    assert type(Mine(model=distributed())) is Mine


def test_a_list_that_the_user_made_is_used_as_it_is():
    model = distributed()
    given = k.CallbackList(add_history=True)
    given.set_model(model)
    x = np.ones((2, 2), np.float32)
    assert model.fit(x, x[:, :1], verbose=0, callbacks=given).epoch == [0]
    assert type(given) is KERAS_LIST


def test_installing_twice_changes_nothing():
    before = dict(vars(KERAS_LIST))
    install()
    assert dict(vars(KERAS_LIST)) == before
    assert k.CallbackList is KERAS_LIST


@pytest.mark.parametrize("change", ["fit", "signature", "module"])
def test_another_keras_is_refused(monkeypatch, change):
    """It would make lists that we do not see: callbacks would write from every rank."""
    monkeypatch.delattr(KERAS_LIST, "__new__")
    if change == "fit":
        monkeypatch.setattr(keras_trainer.TensorFlowTrainer, "fit", lambda self: None)
    elif change == "signature":
        monkeypatch.setattr(KERAS_LIST, "__init__", lambda self, model, callbacks=None: None)
    else:
        monkeypatch.setattr(keras_trainer, "callbacks_module", object())
    with pytest.raises(LaunchError, match=rf"Keras {keras.__version__} does not make its list") as caught:
        install()
    assert caught.value.exit_code == 78
    assert "__new__" not in vars(KERAS_LIST)


def test_this_keras_is_not_refused(monkeypatch):
    monkeypatch.delattr(KERAS_LIST, "__new__")
    install()
    assert type(k.CallbackList(model=distributed())) is FitCallbackList


def test_the_comm_of_a_model():
    comm = SerialComm()
    scaled = keras.optimizers.LossScaleOptimizer
    assert comm_of(None) is comm_of(keras.Sequential()) is comm_of(model_of(keras.optimizers.SGD())) is None
    assert comm_of(model_of(scaled(keras.optimizers.SGD()))) is None
    assert comm_of(model_of(distribute(keras.optimizers.SGD(), comm))) is comm
    inside = model_of(scaled(distribute(keras.optimizers.SGD(), comm)))
    assert comm_of(inside) is comm
    assert type(k.CallbackList(model=inside)) is FitCallbackList
    assert comm_of(model_of(distribute(scaled(keras.optimizers.SGD()), comm))) is comm
    foreign = model_of(keras.optimizers.SGD())
    foreign.optimizer.comm = "another library's"
    assert comm_of(foreign) is None


# Who writes ---------------------------------------------------------------------------------------

STOCK = {
    "BackupAndRestore": (lambda: k.BackupAndRestore("folder"), True),
    "CSVLogger": (lambda: k.CSVLogger("file"), True),
    "EarlyStopping": (lambda: k.EarlyStopping(), False),
    "History": (lambda: k.History(), False),
    "LambdaCallback": (lambda: k.LambdaCallback(), False),
    "LearningRateScheduler": (lambda: k.LearningRateScheduler(float), False),
    "ModelCheckpoint": (lambda: k.ModelCheckpoint("file.keras"), True),
    "ProgbarLogger": (lambda: k.ProgbarLogger(), True),
    "ReduceLROnPlateau": (lambda: k.ReduceLROnPlateau(), False),
    "RemoteMonitor": (lambda: k.RemoteMonitor(), True),
    "SwapEMAWeights": (lambda: k.SwapEMAWeights(), False),
    "TensorBoard": (lambda: k.TensorBoard("folder"), True),
    "TerminateOnNaN": (lambda: k.TerminateOnNaN(), False),
}


def test_no_stock_callback_is_forgotten():
    """A Keras with one more must not put it on all ranks, or on one, by accident."""
    kinds = {name for name in dir(k) if isinstance(getattr(k, name), type)}
    # Orbax's wants a package that we do not install.
    assert kinds - {"Callback", "CallbackList", "OrbaxCheckpoint"} == set(STOCK)


@pytest.mark.parametrize("name", STOCK)
def test_who_writes(name):
    make, writes = STOCK[name]
    callback = make()
    assert is_writer(callback) == writes
    kept = RankCallbackList([callback], model=distributed(), comm=RankOne()).callbacks
    assert kept == ([] if writes else [callback])
    callback.rank_zero_only = not writes  # it knows better
    assert is_writer(callback) != writes


def test_who_writes_by_subclass_and_by_saying_so():
    class Checkpoint(k.ModelCheckpoint):
        pass

    class Everywhere(k.ModelCheckpoint):
        rank_zero_only = False

    class Report(k.Callback):
        rank_zero_only = True

    assert is_writer(Checkpoint("a.keras")) and is_writer(Report())
    assert not is_writer(Everywhere("a.keras")) and not is_writer(k.Callback())


def test_other_ranks_are_silent():
    loud = k.EarlyStopping("loss", verbose=1)

    class Mine(k.EarlyStopping):
        pass

    mine = Mine("loss", verbose=1)
    made = RankCallbackList([loud, mine], add_progbar=True, model=distributed(), comm=RankOne())
    assert (loud.verbose, mine.verbose) == (0, 1)  # what a user has written may speak
    assert made.callbacks == [loud, mine]


@pytest.mark.parametrize(
    ("callbacks", "at_begin", "at_end"),
    [
        ([], False, False),
        ([k.ModelCheckpoint("a.keras", save_freq=1), k.TensorBoard("a"), k.EarlyStopping()], False, False),
        ([k.TerminateOnNaN()], False, True),
        ([k.LambdaCallback(on_train_batch_begin=lambda batch, logs: None)], True, False),
        ([k.LambdaCallback(on_epoch_end=lambda epoch, logs: None)], False, False),
    ],
)
def test_batches_are_agreed_on_only_where_a_callback_looks_at_them(callbacks, at_begin, at_end):
    comm = RankOne()
    made = RankCallbackList(callbacks, model=distributed(), comm=comm)
    made.model.stop_training = False
    made.on_train_begin()
    calls = []
    for hook in (made.on_train_batch_begin, made.on_train_batch_end):
        before = comm.calls
        hook(0, {"loss": 1.0})
        calls.append(comm.calls - before)
    assert calls == [int(at_begin), int(at_end)]
