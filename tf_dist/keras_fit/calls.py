"""`Model.fit`, `evaluate` and `predict` over ranks: the same call trains one model.

* ``fit``: the optimizer is distributed, and every rank computes its rows of each global batch, whatever
  form the data have. What is not so yet is made so, and said.
* ``evaluate``, ``predict``: a dataset of `shard` is shared out, and metrics are those of all rows; any
  other data are evaluated whole on each rank that calls, without communication. A validation within
  ``fit`` is shared out always.

Ranks that are to train models of their own say so: `independent`.
"""

from __future__ import annotations

import inspect
import logging
import random
import secrets
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import trainer as keras_trainer
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from tensorflow.python.eager import context as tf_context

from tf_dist.comm.formatting import named
from tf_dist.comm.runtime.communicators import connected
from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import LaunchError, UsageError
from tf_dist.keras_callbacks.replica_sync import deferred_starts
from tf_dist.keras_fit import self_test
from tf_dist.keras_fit.data_fingerprints import compare_all
from tf_dist.keras_fit.dataset import Sharding, inherited_sharding, rows_of_rank, sharding_of
from tf_dist.keras_fit.distributed_optimizer import made_distributed
from tf_dist.keras_fit.fit_consistency import check_meaning, check_state
from tf_dist.keras_fit.fit_session import (
    Call,
    FitSession,
    begin_session,
    current_call,
    is_independent,
    session_of,
    under_way,
)
from tf_dist.keras_fit.generators import read_no_further
from tf_dist.keras_fit.optimizers_of import distributed_of, optimizers_of
from tf_dist.keras_fit.rendezvous import PATIENCE_S, missing_ranks
from tf_dist.keras_fit.unweighted import without_weights

LOG = logging.getLogger(__name__)
Method = Callable[..., Any]


def install() -> None:
    """Patch Keras, once; any further call changes nothing."""
    trainer = keras_trainer.TensorFlowTrainer  # of keras.Model, and of layers that are mixed with it alone
    if hasattr(trainer.fit, "_over_ranks"):
        return
    for name, wrapped in (("fit", _fit), ("evaluate", _evaluate), ("predict", _predict)):
        method = wrapped(getattr(trainer, name))
        method._over_ranks = True  # type: ignore[attr-defined]
        setattr(trainer, name, method)
    keras_trainer.TFEpochIterator.__init__ = _epoch_iterator(keras_trainer.TFEpochIterator.__init__)


# The calls -----------------------------------------------------------------------------------------


def _fit(fit: Method) -> Method:
    signature = inspect.signature(fit)

    @wraps(fit)
    def over_ranks(self: Any, *arguments: Any, **words: Any) -> Any:
        given = signature.bind(self, *arguments, **words).arguments
        comm = _ranks_of_fit(self, given.get("x"))
        if comm is None:
            return fit(self, *arguments, **words)
        session = _ready(self, comm)
        session.in_fit = True
        try:
            # Whoever builds an optimizer on one rank only (`BackupAndRestore`): `begin` shares all state.
            epochs = int(given.get("epochs", 1)) - int(given.get("initial_epoch", 0))
            with under_way(Call(comm, training=True, epochs=epochs, session=session)), deferred_starts():
                check_meaning(self, comm, _facts(given))
                history = fit(self, *arguments, **words)
        finally:
            session.in_fit = False
        if comm.size > 1 and session.begun:
            compare_all(comm)
            check_state(self, comm, "at the end")
            check_meaning(self, comm, {"stop_training": bool(self.stop_training)})
        return history

    return over_ranks


def _ranks_of_fit(model: Any, data: Any) -> Comm | None:
    """The ranks that a `fit` is over: those of the optimizer, of the data, or all that are connected."""
    found = distributed_of(model)
    if is_independent():
        if found and found[0].comm.size > 1:
            raise UsageError(
                "this optimizer is distributed, and tf_dist.independent() is for models that each rank "
                "trains by itself: give the model an optimizer of its own"
            )
        return None
    comms = {id(optimizer.comm): optimizer.comm for optimizer in found}
    if len(comms) > 1:
        raise UsageError("the optimizers of this model are distributed over different ranks")
    mine: Comm | None = next(iter(comms.values()), None)
    sharding = inherited_sharding(data)
    if sharding is not None and mine is not None and sharding.comm.size != mine.size:
        raise UsageError(
            f"the data are shared out among {sharding.comm.size} ranks, and the optimizer is distributed "
            f"over {mine.size}: give shard() and distribute() the same ranks"
        )
    if mine is not None:
        return mine
    comm = sharding.comm if sharding is not None else connected()
    if comm is None or comm.size == 1:
        return None
    if missing := missing_ranks(comm):
        raise UsageError(
            f"model.fit on rank {comm.rank} of {comm.size}: its optimizer is not distributed, and "
            f"{named(missing)} did not come to fit within {PATIENCE_S:.0f} s. For all ranks to train one "
            "model, call fit on all of them: model.compile(tf_dist.distribute(optimizer, comm), ...). For a "
            "model that this rank trains by itself: with tf_dist.independent(): model.fit(...)"
        )
    self_test.run()
    for optimizer in optimizers_of(model):
        made_distributed(optimizer, comm)
    once(LOG, comm).info(
        f"model.fit: the optimizer was not distributed; it is now, over {comm.size} ranks. "
        "(Ranks that train models of their own: with tf_dist.independent(): ...)"
    )
    return comm


def _ready(model: Any, comm: Comm) -> FitSession:
    if not hasattr(type(model).make_train_function, "__wrapped__"):
        raise UsageError(
            f"{type(model).__name__} has a make_train_function of its own, in which nobody knows the other "
            "ranks: override train_step instead, or use tf_dist.Trainer"
        )
    session = session_of(model) or begin_session(model, comm)
    session.begun, session.steps = False, 0
    return session


def _facts(given: dict[str, Any]) -> dict[str, Any]:
    """What all ranks must ask of a `fit` alike."""
    names = (
        "batch_size", "epochs", "validation_split", "shuffle", "class_weight", "initial_epoch",
        "steps_per_epoch", "validation_steps", "validation_batch_size", "validation_freq",
    )  # fmt: skip
    facts: dict[str, Any] = {name: repr(given[name]) for name in names if name in given}
    for name in ("x", "y", "sample_weight", "validation_data"):
        facts[name] = type(given.get(name)).__name__
    return facts


def _evaluate(evaluate: Method) -> Method:
    @wraps(evaluate)
    def over_ranks(self: Any, x: Any = None, *arguments: Any, **words: Any) -> Any:
        if words.get("_use_cached_eval_dataset"):  # within fit
            call, session = current_call(), session_of(self)
            if session is not None:
                session.evaluation_is_shared = call is not None and call.comm is not None
            return evaluate(self, x, *arguments, **words)
        sharding = inherited_sharding(x)
        comm = None if sharding is None or sharding.comm.size == 1 else sharding.comm
        session = session_of(self)
        if comm is not None and session is None:
            session = begin_session(self, comm)
        before = session is not None and session.evaluation_is_shared
        if session is not None:
            session.evaluation_is_shared = comm is not None
        try:
            with under_way(Call(comm, training=False)):
                return evaluate(self, x, *arguments, **words)
        finally:
            if session is not None:
                session.evaluation_is_shared = before

    return over_ranks


def _predict(predict: Method) -> Method:
    @wraps(predict)
    def of_rows(self: Any, x: Any, *arguments: Any, **words: Any) -> Any:
        with under_way(Call(None, training=False)):
            return predict(self, x, *arguments, **words)

    return of_rows


# Their data ----------------------------------------------------------------------------------------


def _epoch_iterator(original: Method) -> Method:
    @wraps(original)
    def init(self: Any, distribute_strategy: Any = None, *arguments: Any, **words: Any) -> None:
        call, x = current_call(), words.get("x")
        sharding = inherited_sharding(x)
        direct = sharding_of(x)
        if direct is not None and direct.global_batches is not None:
            words["x"] = direct.global_batches
        if sharding is not None:
            words["shuffle"] = False  # which Keras would warn of, where nobody has asked for it
        comm = call.comm if call is not None and sharding is None else None
        alike = call is not None and call.training and call.comm is not None
        with _alike_on_all_ranks(call.comm) if alike and call is not None and call.comm else nullcontext():
            original(self, distribute_strategy, *arguments, **words)
        if call is not None:
            of_training = "class_weight" in words  # which Keras gives to no others, be it None
            read_no_further(self, call.epochs if of_training else 1)
            if of_training and call.session is not None:
                call.session.data_may_draw = not isinstance(self.data_adapter, ArrayDataAdapter)
        _share_out(self, comm, sharding, direct)

    return init


def _share_out(iterator: Any, comm: Comm | None, sharding: Sharding | None, direct: Sharding | None) -> None:
    dataset = iterator._distributed_dataset
    if sharding is not None and direct is None:  # made from a dataset of shard: rows are taken already
        iterator._distributed_dataset = without_weights(dataset, sharding)
        return
    if sharding is not None:
        comm = sharding.comm if sharding.global_batches is not None else None
    if comm is None or comm.size == 1:
        return
    if not isinstance(dataset, tf.data.Dataset):
        raise UsageError("model.fit over ranks takes data that TensorFlow can read, outside of tf.distribute")
    iterator._distributed_dataset = rows_of_rank(dataset, comm)


@contextmanager
def _alike_on_all_ranks(comm: Comm) -> Iterator[None]:
    """Let all ranks shuffle alike, by the generators of rank 0; a collective where they differ.

    Ranks that were given one seed are left as they are: they shuffle as one process does.
    """
    context = tf_context.context()
    seed = context._seed
    mine = [_state_digest(), seed]
    everyone = comm.allgather_obj([*mine, secrets.randbits(31) if seed is None else seed])
    if len({str(theirs[0]) for theirs in everyone}) > 1:
        version, numbers, gauss = random.getstate()
        name, keys, *rest = np.random.get_state()
        states = comm.broadcast_obj([[version, list(numbers), gauss], [name, [int(k) for k in keys], *rest]])
        random.setstate((states[0][0], tuple(states[0][1]), states[0][2]))
        np.random.set_state((states[1][0], np.array(states[1][1], np.uint32), *states[1][2:]))
    if seed is not None and len({theirs[1] for theirs in everyone}) == 1:
        yield
        return
    rng = getattr(context, "_rng", None)
    tf.random.set_seed(everyone[0][2])
    try:
        yield
    finally:
        context._seed, context._rng = seed, rng


def _state_digest() -> int:
    _, keys, *rest = np.random.get_state()
    return zlib.crc32(repr((random.getstate(), np.asarray(keys).tolist(), rest)).encode())


def check_keras() -> None:
    """Look whether Keras is what the patches take it for.

    Raises:
        LaunchError: it makes its iterators elsewhere.
    """
    known = inspect.signature(inspect.unwrap(keras_trainer.TFEpochIterator.__init__)).parameters
    if "distribute_strategy" not in known:
        raise LaunchError(
            f"Keras {keras.__version__} makes its batches where tf_dist does not look for them: every rank "
            "would train on all rows. Use Keras 3.13 to 3.15, or tf_dist.Trainer"
        )
