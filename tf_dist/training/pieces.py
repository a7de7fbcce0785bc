"""`Piece`: what one rank holds of a tensor of the whole model, or of its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tf_dist.parallel.parts import Part


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of a (part of a) tensor, flat: what one rank holds.

    part: of the whole tensor. read: gives them, as a 1-D array. write: takes them.
    """

    part: Part
    start: int
    stop: int
    read: Callable[[], np.ndarray]
    write: Callable[[np.ndarray], None]


def variable_piece(variable: Any, part: Part) -> Piece:
    """All of a variable, as a piece of the whole tensor."""

    def write(values: np.ndarray) -> None:
        variable.assign(values.reshape(part.shape))

    return Piece(part, 0, prod(part.shape), lambda: np.asarray(variable.value).reshape(-1), write)


def array_piece(array: np.ndarray, part: Part) -> Piece:
    """All of a flat array, which it reads and writes in place."""
    return Piece(part, 0, array.size, lambda: array, lambda values: np.copyto(array, values))
