"""Reduction order: in which order terms are added, in which chunks, and which rank adds which slice.

Pure arithmetic: `tf_dist.comm.transport.pipelined_allreduce` and `tf_dist.comm.transport.shared_memory`
communicate, and `Comm` documents what they guarantee.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Slices of ranks begin at multiples of this many elements: a cache line of float32.
ALIGNED_ELEMENTS = 16
# Elements per partial sum of squares: fixed, so that no number of threads or ranks changes a bit.
SQUARES_BLOCK = 4096
# Elements added to all terms before the next ones, full blocks of squares: they stay in the cache.
ADDED_AT_ONCE = 32 * SQUARES_BLOCK


@dataclass(frozen=True)
class ReductionOrder:
    """Order of addition of terms on several ranks: floating-point sums depend on it.

    counts: number of terms of each rank, (R,). additions: pairs (i, j) of terms, numbered through all
    ranks; one after another, term i becomes term i + term j, and the sum ends in term 0.
    """

    counts: tuple[int, ...]
    additions: tuple[tuple[int, int], ...]


class Reduced(NamedTuple):
    """A sum over all ranks; with the sums of squares of its blocks, if they came for free.

    array: the sum, of the shape of one term. squares: of each full `SQUARES_BLOCK` elements, float32.
    """

    array: np.ndarray
    squares: np.ndarray | None = None


def add_in_order(terms: Sequence[np.ndarray], additions: Sequence[tuple[int, int]]) -> np.ndarray:
    """Add terms in place as a `ReductionOrder` prescribes, in blocks; returns ``terms[0]``, the sum."""
    for start in range(0, terms[0].size, ADDED_AT_ONCE):
        parts = [term[start : start + ADDED_AT_ONCE] for term in terms]
        for i, j in additions:
            parts[i] += parts[j]
    return terms[0]


def block_squares(array: np.ndarray, out: np.ndarray) -> None:
    """Sum the squares of each full `SQUARES_BLOCK` elements of a float32 array, single-threaded.

    As row-column products: these use BLAS's dot, a third of the time of `np.einsum`, and a block
    is too small for BLAS to split among threads.
    """
    rows = array[: array.size - array.size % SQUARES_BLOCK].reshape(-1, 1, SQUARES_BLOCK)
    with np.errstate(over="ignore", invalid="ignore"):
        np.matmul(rows, rows.transpose(0, 2, 1), out=out.reshape(-1, 1, 1))


def slices(length: int, ranks: int) -> list[slice]:
    """Split ``length`` elements into one slice per rank, on cache lines, balanced to within one line."""
    lines = -(-length // ALIGNED_ELEMENTS)
    cuts = [min(length, lines * rank // ranks * ALIGNED_ELEMENTS) for rank in range(ranks + 1)]
    return [slice(*cut) for cut in itertools.pairwise(cuts)]


def slices_of_blocks(length: int, ranks: int) -> list[slice]:
    """Split ``length`` elements into one slice per rank, at full `SQUARES_BLOCK`; the last has the rest."""
    cuts = [length // SQUARES_BLOCK * rank // ranks * SQUARES_BLOCK for rank in range(ranks)]
    return [slice(*cut) for cut in itertools.pairwise([*cuts, length])]
