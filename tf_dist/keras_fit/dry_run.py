"""A step of the user's code that leaves no trace: what it changes is put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from tf_dist.keras_fit.fit_session import session_of
from tf_dist.keras_fit.optimizers_of import optimizers_of


@contextmanager
def put_back(model: Any) -> Iterator[None]:
    """Put back variables, also those made meanwhile, and the states of Python's and NumPy's generators.

    Not those states where threads that read the data draw from them: they would draw the same numbers again.
    """
    known: dict[int, tuple[Any, np.ndarray]] = {}
    initialize, assign = keras.Variable._initialize, keras.Variable._direct_assign

    def note(variable: Any) -> None:
        if id(variable) not in known:
            known[id(variable)] = variable, np.array(variable.numpy())

    def initialized(self: Any, value: Any) -> None:
        initialize(self, value)
        note(self)

    def assigned(self: Any, value: Any) -> None:
        note(self)  # metrics that compile was given as objects are none of the model's before its first step
        assign(self, value)

    for one in _variables(model):
        note(one)
    states = random.getstate(), np.random.get_state()
    try:
        with (
            mock.patch.object(keras.Variable, "_initialize", initialized),
            mock.patch.object(keras.Variable, "_direct_assign", assigned),
        ):
            yield
    finally:
        for variable, value in known.values():
            variable.assign(value)
        session = session_of(model)
        if session is None or not session.data_may_draw:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _variables(model: Any) -> list[Any]:
    variables = list(model.variables) + [v for metric in model.metrics for v in metric.variables]
    for optimizer in optimizers_of(model):
        variables += list(optimizer.variables)
    return [one for one in variables if hasattr(one, "path")]


@contextmanager
def eagerly() -> Iterator[None]:
    """Run functions of TensorFlow as Python, operation by operation."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
