"""Deferred initialization: a model with layers, shapes and initializers, but without memory for weights.

Keras gives every weight an initializer with its own seed, drawn when its layer is created. So a weight's
initial value does not depend on which other weights exist: a rank can create those it needs, one by one,
with the same values as in the full model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import StatelessScope

# Where Keras lists variables that it has yet to create.
WAITING = "uninitialized_variables"


@contextlib.contextmanager
def outline() -> Iterator[None]:
    """Defer the weights of models that are built here: `materialize` creates them."""
    waiting = list(global_state.get_global_attribute(WAITING) or [])
    try:
        with StatelessScope(initialize_variables=False):
            yield
    finally:
        # Else Keras would create them all when it next leaves such a scope, for any model.
        global_state.set_global_attribute(WAITING, waiting)


def is_deferred(variable: Any) -> bool:
    """Whether a Keras variable has no value yet."""
    return variable._value is None


def initial_value(variable: Any) -> np.ndarray:
    """The initial value of a deferred variable, which is not stored."""
    return np.asarray(variable._initializer(tuple(variable.shape), dtype=variable.dtype))


def materialize(variables: list[Any]) -> None:
    """Allocate and initialize deferred variables; others are unchanged."""
    for variable in variables:
        if is_deferred(variable):
            variable._deferred_initialize()
