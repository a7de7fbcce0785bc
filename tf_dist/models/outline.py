"""A model without its weights: layers, shapes and how each weight begins, but none of their memory.

Keras gives every weight an initializer with a seed of its own, drawn when its layer is made. So a weight's
first value does not depend on which other weights exist: a rank can make those it needs, one after another,
and they are the same as in the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import StatelessScope


@contextlib.contextmanager
def outline() -> Iterator[None]:
    """Models that are built here have no weights yet: `materialize` makes them."""
    # Keras notes variables without a value, and would make all of them where its next such scope ends.
    noted = "uninitialized_variables"
    before = list(global_state.get_global_attribute(noted, []))
    try:
        with StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(noted, before)


def is_outline(variable: Any) -> bool:
    """Whether a Keras variable has no value yet."""
    return variable._value is None


def first_value(variable: Any) -> np.ndarray:
    """The value with which a variable of an outline begins; it keeps none of it."""
    return np.asarray(variable._initializer(tuple(variable.shape), dtype=variable.dtype))


def materialize(variables: list[Any]) -> None:
    """Give variables of an outline their memory and first values; others are left alone."""
    for variable in variables:
        if is_outline(variable):
            variable._deferred_initialize()
