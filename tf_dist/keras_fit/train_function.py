"""Keras's train and test functions over ranks: each step runs in a `step_scope`, and is checked.

`Model.make_train_function` and `make_test_function` are wrapped, for models over ranks only. The compiled
step must not be XLA's, which no message can leave. Before the first step of a `fit`, all ranks build the
model, begin as rank 0, compare their data, and find the law of the objective; then they compare their
weights from time to time (`fit_consistency`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import chain, islice
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import trainer as keras_trainer

from tf_dist.comm.runtime.log_handlers import once
from tf_dist.errors import LaunchError, UsageError, behind
from tf_dist.keras_callbacks.replica_sync import broadcast, deferred_starts, is_distributed
from tf_dist.keras_fit import objective, rank_randomness, user_metrics
from tf_dist.keras_fit.data_fingerprints import compare_all
from tf_dist.keras_fit.dataset import counted
from tf_dist.keras_fit.distributed_optimizer import end_of_step
from tf_dist.keras_fit.fit_consistency import check_layout, check_state, is_due, state_of
from tf_dist.keras_fit.fit_session import FitSession, session_of
from tf_dist.keras_fit.global_losses import is_users_code
from tf_dist.keras_fit.gradient_reduction import order_after
from tf_dist.keras_fit.optimizers_of import distributed_of
from tf_dist.keras_fit.stateful_layers import refuse_stateful
from tf_dist.keras_fit.step_logs import of_all_rows
from tf_dist.keras_fit.step_scope import Law, StepScope, entered
from tf_dist.keras_fit.whose_objective import is_keras_alone

LOG = logging.getLogger(__name__)
NOT_CALLED = (
    f"Keras {keras.__version__} does not call Optimizer.apply as the versions do that tf_dist was made for: "
    "training would run unsynchronised. Use Keras 3.13 to 3.15, or tf_dist.Trainer"
)
Function = Callable[[Any], Any]
# `train_on_batch` with sample weights is a step of a loop of one's own: the weights of `shard` make the mean
# of the ranks' losses that of all rows.
OF_A_LOOP = Law(global_losses=False)


def install() -> None:
    """Patch Keras, once; any further call changes nothing."""
    trainer = keras_trainer.TensorFlowTrainer
    if hasattr(trainer.make_train_function, "__wrapped__"):
        return
    trainer.make_train_function = _over_ranks(trainer.make_train_function, "train")
    trainer.make_test_function = _over_ranks(trainer.make_test_function, "test")


def _over_ranks(make: Callable[..., Any], kind: str) -> Callable[..., Any]:
    name = f"{kind}_function"

    @wraps(make)
    def make_function(self: Any, force: bool = False) -> Any:
        session, known = session_of(self), getattr(self, name)
        over_ranks = session is not None and (kind == "train" or session.evaluation_is_shared)
        if known is not None and getattr(known, "_over_ranks", False) != over_ranks:
            force = True  # made for the other way of evaluating
        if not over_ranks or (known is not None and not force):
            return make(self, force)
        assert session is not None
        user_metrics.install()  # classes of metrics that were defined since
        step, jit_compile = getattr(self, f"{kind}_step"), self.jit_compile
        if kind == "train" and not session.law_is_given:
            session.law = None  # the model may have been compiled with another loss
        if jit_compile and kind == "train" and session.comm.size > 1:
            once(LOG, session.comm).info(
                "jit_compile: training steps are compiled without XLA, which cannot reach the other ranks"
            )
        self.jit_compile = False
        scoped = _scoped(self, step, session, kind == "train")
        try:
            with _attribute(self, f"{kind}_step", scoped):
                made = make(self, force)
        finally:
            self.jit_compile = jit_compile
        function = getattr(self, name)
        function = _step_by_step(self, function)
        function = _checked(self, function, step, session) if kind == "train" else _translated(function)
        function._over_ranks = True  # type: ignore[attr-defined]
        setattr(self, name, function)
        return made

    return make_function


@contextmanager
def _attribute(model: Any, name: str, value: Any) -> Iterator[None]:
    """Let a model have an attribute for a while; past Keras, which would track it."""
    missing = object()
    before = vars(model).get(name, missing)
    object.__setattr__(model, name, value)
    try:
        yield
    finally:
        object.__delattr__(model, name)
        if before is not missing:
            object.__setattr__(model, name, before)


def _scoped(model: Any, step: Function, session: FitSession, training: bool) -> Function:
    """A step that knows the other ranks. With one rank Keras's own arithmetic is the right one."""
    own = is_users_code(step)

    @wraps(step)
    def scoped(data: Any) -> Any:
        data, rows = counted(data)
        data = _of_any_rows(data)
        law = _law(session, training, own, data)
        scope = StepScope(session.reduction, law, training, data, rows, model)
        leaves = [leaf for leaf in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(leaf)]
        # Nothing of a step may run where its batch is not there: at the end of a dataset of unknown length.
        with tf.control_dependencies(leaves), rank_randomness.global_seed_of(session.comm.rank):
            if session.comm.size == 1:
                return step(data)
            with entered(scope):
                if not own:
                    return step(data)
                scope.share()  # now: whatever asks for it later may do so inside of a branch
                logs = step(data)
                for optimizer in distributed_of(model):
                    order_after(end_of_step(optimizer))
                return of_all_rows(logs, scope)

    return scoped


def _of_any_rows(data: Any) -> Any:
    """The same batch, whose number of rows is not known while a graph is traced.

    Keras takes a target of as many rows as a model has outputs for a list of targets, where it knows how many
    rows there are; this rank has others than one process.
    """
    if tf.executing_eagerly():
        return data

    def relaxed(leaf: Any) -> Any:
        if not isinstance(leaf, tf.Tensor) or not leaf.shape.rank or leaf.shape[0] is None:
            return leaf
        return tf.compat.v1.placeholder_with_default(leaf, [None, *leaf.shape[1:]])

    return tf.nest.map_structure(relaxed, data)


def _law(session: FitSession, training: bool, own: bool, data: Any) -> Law:
    law = session.law or Law()
    if training:
        return OF_A_LOOP if not session.in_fit and _has_weights(data) else law
    # An evaluation has no gradients. What its losses divide by is known, whatever the training step does.
    return replace(
        law, global_losses=True, gradients=law.gradients if own and law.gradients == "sum" else "global"
    )


def _step_by_step(model: Any, function: Function) -> Function:
    """A function of several steps per call that makes them one after the other, in Python.

    TensorFlow may begin a round of its loop before the last one has ended, and the ranks would exchange what
    belongs to different steps.
    """

    @wraps(function)
    def one_by_one(data: Any) -> Any:
        steps = int(getattr(model, "steps_per_execution", 1))
        if steps == 1 or not isinstance(data, tf.data.Iterator):
            return function(data)
        batches = list(islice(_walked(data), steps))
        if not batches:
            raise StopIteration
        return function(iter(batches))

    return one_by_one


def _has_weights(data: Any) -> bool:
    """Whether a batch is (x, y, sample_weight), as `train_on_batch` makes it, with weights."""
    return isinstance(data, tuple) and len(data) == 3 and data[2] is not None


def _translated(function: Function) -> Function:
    def translated(data: Any) -> Any:
        try:
            return function(data)
        except tf.errors.OpError as error:
            raise behind(error) from None

    return translated


def _checked(model: Any, function: Function, step: Function, session: FitSession) -> Function:
    """The training function; its first step must go through us, and our errors come out as ours."""
    visits = [type(optimizer).visits for optimizer in distributed_of(model)]

    def checked(data: Any) -> Any:
        if not session.begun:
            data = begin(model, step, data, session)
        try:
            logs = function(data)
        except tf.errors.OpError as error:
            cause = behind(error)
            if cause is not error:
                raise cause from None
            raise
        if [
            type(optimizer).visits for optimizer in distributed_of(model)
        ] == visits and model.trainable_weights:
            raise LaunchError(f"a training step did not call the distributed optimizer. {NOT_CALLED}")
        session.steps += 1
        if is_due(session.steps):
            check_state(model, session.comm, f"after step {session.steps}")
        return logs

    return checked


def begin(model: Any, step: Function, data: Any, session: FitSession) -> Any:
    """Begin a `fit` on all ranks alike; a collective. Returns the data, of which a batch was looked at.

    Raises:
        LaunchError: the ranks have different models or data.
        UsageError: the model cannot be built, it is stateful, or what it computes over ranks is not what one
            process computes.
    """
    batch, data = _first_batch(data, getattr(model, "steps_per_execution", 1))
    batch, _ = counted(batch)
    compare_all(session.comm)
    if batch is not None:
        _build(model, step, batch, session)
    if session.comm.size > 1:
        refuse_stateful(model, session.comm.size)
    with deferred_starts():
        if is_distributed(model.optimizer) and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
    check_layout(model, session.comm)
    broadcast(state_of(model), session.comm)
    for optimizer in distributed_of(model):
        type(optimizer).started = optimizer.built
    if session.law is None and batch is not None and session.comm.size > 1:
        alone = is_keras_alone(model)
        session.law = Law() if alone else objective.decided(model, step, batch, session)
    session.begun = True
    return data


def _built(model: Any) -> bool:
    return all(layer.built for layer in model._flatten_layers())


def _build(model: Any, step: Function, batch: Any, session: FitSession) -> None:
    """Make the weights now: inside of a traced step they would have no values to begin from."""

    def spec(leaf: Any) -> Any:
        return None if leaf is None else tf.TensorSpec(np.shape(leaf), tf.as_dtype(leaf.dtype))

    problem = ""
    if not _built(model):
        with deferred_starts():
            try:
                model._symbolic_build(data_batch=keras.tree.map_structure(spec, batch))
            except Exception as error:  # a call() that takes something else than the batch, or none at all
                problem = objective.built_by_a_step(model, step, batch) and _last(error)
    problems = [one for one in session.comm.allgather_obj(problem) if one]
    if problems:
        raise UsageError(
            f"{type(model).__name__} cannot be built before its first step, as weights that begin alike on "
            f"all ranks need: call it on a batch of data before fit. Keras says: {problems[0]}"
        )


def _last(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


# The first batch -----------------------------------------------------------------------------------


def _first_batch(data: Any, steps: int) -> tuple[Any, Any]:
    """The first batch of an iterator, and an iterator that still has it; None where it has none."""
    batches = list(islice(_walked(data), int(steps)))
    if not batches:
        return None, data
    if not isinstance(data, tf.data.Iterator):
        return batches[0], chain(batches, data)
    first = tf.nest.map_structure(_without_optional, batches[0])
    if not all(
        isinstance(spec, tf.TensorSpec | tf.RaggedTensorSpec) for spec in tf.nest.flatten(data.element_spec)
    ):
        return first, iter(batches)  # the step is traced once more, for the next batches
    again = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=data.element_spec)
    return first, iter(again)


def _walked(data: Any) -> Iterator[Any]:
    while True:
        try:
            yield next(data)
        except (StopIteration, tf.errors.OutOfRangeError):
            return


def _without_optional(leaf: Any) -> Any:
    return None if isinstance(leaf, tf.experimental.Optional) else leaf
