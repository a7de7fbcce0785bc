"""Context parallelism: which tokens of a row a rank has (zigzag layout), and what its queries attend to.

Attention is causal: a token attends to itself and to those before it. With contiguous slices of a row, the
last rank would attend to everything and the first one only to itself. So a row is split into 2 s chunks, and
rank k of s has chunk k and chunk 2 s - 1 - k, one early and one late: with every other rank's tokens each
rank then has the same work, half of all pairs, without a mask ("zigzag", as in Dubey et al. 2024, section
3.3.2; Brandon et al. 2023 balance by stripes of single tokens).

    s = 4      chunk   0 1 2 3 4 5 6 7
               rank    0 1 2 3 3 2 1 0

Legend: B rows, T tokens, s ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class VisibleBlock(NamedTuple):
    """Slices of one rank's queries and another one's keys, in local order; all keys precede all queries."""

    queries: slice
    keys: slice


def chunks(seq_len: int, ranks: int) -> tuple[int, int]:
    """Lengths of a rank's early and late chunk, the same for all ranks; they differ if T / s is odd."""
    each = seq_len // ranks
    return each - each // 2, each // 2


def columns(seq_len: int, rank: int, ranks: int) -> np.ndarray:
    """Positions in a row of the T / s tokens of a rank, ascending, int64.

    A rank's inputs and targets are ``x[:, columns(...)]`` and ``y[:, columns(...)]``: targets are those of
    the full row, so the target of a chunk's last token is the first token of the next chunk.

    Args:
        seq_len: T, a multiple of ``ranks``.
        rank: 0 <= rank < ranks, the coordinate along `Mesh.sequence`.
        ranks: s.
    """
    return np.concatenate([np.array(one, np.int64) for one in own_chunks(seq_len, rank, ranks)])


def own_chunks(seq_len: int, rank: int, ranks: int) -> tuple[range, range]:
    """A rank's early and late chunk, as positions in a row."""
    early, late = chunks(seq_len, ranks)
    first, second = rank * early, ranks * early + (ranks - 1 - rank) * late
    return range(first, first + early), range(second, second + late)


def seen(seq_len: int, rank: int, source: int, ranks: int) -> VisibleBlock:
    """The part of the attention between this rank's queries and another rank's keys that is not masked.

    Both chunks of this rank lie after an earlier rank's early chunk, and before its late one. A later rank's
    chunks both lie between those of this rank.
    """
    early, late = chunks(seq_len, ranks)
    assert source != rank, "among its own tokens a rank needs a mask"
    if source < rank:
        return VisibleBlock(slice(0, early + late), slice(0, early))
    return VisibleBlock(slice(early, early + late), slice(0, early + late))
