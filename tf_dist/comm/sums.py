"""Sums as arithmetic: in which order terms are added, in which pieces, and who adds which slice.

Nothing here talks: `tf_dist.comm.exchange` and `tf_dist.comm.node` do, and `Comm` says what they promise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Slices of ranks begin at multiples of this many elements: a cache line of float32.
ALIGNED_ELEMENTS = 16
# Elements whose squares are summed before the sums are: fixed, so that no thread and no rank changes a bit.
SQUARES_BLOCK = 4096
# Elements that are added to all terms before the next ones, whole blocks of squares: they stay in the cache.
ADDED_AT_ONCE = 32 * SQUARES_BLOCK


@dataclass(frozen=True)
class Order:
    """In which order terms that lie on several ranks are added: floating-point sums depend on it.

    counts: how many terms each rank holds, (R,). additions: pairs (i, j) of terms, numbered through all
    ranks; one after another, term i becomes term i + term j, and the sum ends in term 0.
    """

    counts: tuple[int, ...]
    additions: tuple[tuple[int, int], ...]


class Sum(NamedTuple):
    """A sum over all ranks; with it, where they came for free, the sums of squares of its blocks.

    array: the sum, of the shape of one term. squares: of each whole `SQUARES_BLOCK` elements, float32.
    """

    array: np.ndarray
    squares: np.ndarray | None = None


def add_in_order(terms: Sequence[np.ndarray], additions: Sequence[tuple[int, int]]) -> np.ndarray:
    """Make the additions of an `Order`, in place, some elements at a time; ``terms[0]``, where a sum ends."""
    for start in range(0, terms[0].size, ADDED_AT_ONCE):
        parts = [term[start : start + ADDED_AT_ONCE] for term in terms]
        for i, j in additions:
            parts[i] += parts[j]
    return terms[0]


def block_squares(array: np.ndarray, out: np.ndarray) -> None:
    """Sum the squares of each whole `SQUARES_BLOCK` elements of a float32 array, by one thread.

    As products of a row and a column: these are BLAS's dot, a third of the time of `np.einsum`, and a block
    is too small for BLAS to share it out among threads.
    """
    rows = array[: array.size - array.size % SQUARES_BLOCK].reshape(-1, 1, SQUARES_BLOCK)
    with np.errstate(over="ignore", invalid="ignore"):
        np.matmul(rows, rows.transpose(0, 2, 1), out=out.reshape(-1, 1, 1))


def slices(length: int, ranks: int) -> list[slice]:
    """``length`` elements cut into one slice for each rank, on cache lines, balanced to within one line."""
    lines = -(-length // ALIGNED_ELEMENTS)
    cuts = [min(length, lines * rank // ranks * ALIGNED_ELEMENTS) for rank in range(ranks + 1)]
    return [slice(*cut) for cut in itertools.pairwise(cuts)]


def slices_of_blocks(length: int, ranks: int) -> list[slice]:
    """``length`` elements cut for each rank at whole `SQUARES_BLOCK`; the last one has what is left."""
    cuts = [length // SQUARES_BLOCK * rank // ranks * SQUARES_BLOCK for rank in range(ranks)]
    return [slice(*cut) for cut in itertools.pairwise([*cuts, length])]
