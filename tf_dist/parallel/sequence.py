"""Which tokens of a row a rank has, when ranks share rows, and which of another rank's its own look at.

Attention is causal: a token looks at itself and those before it. If ranks had neighbouring stretches of a
row, the last one would look at everything and the first one at itself alone. So a row is cut into 2 s chunks,
and rank k of s has chunk k and chunk 2 s - 1 - k, one early and one late: with every other rank's tokens each
rank then has the same work, half of all pairs, without a mask ("zigzag", as in Dubey et al. 2024, section
3.3.2; Brandon et al. 2023 balance by stripes of single tokens).

    s = 4      chunk   0 1 2 3 4 5 6 7
               rank    0 1 2 3 3 2 1 0

Legend: B rows, T tokens, s ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Seen(NamedTuple):
    """Queries of one rank and keys of another, in their local order, all of which come before all queries."""

    queries: slice
    keys: slice


def chunks(seq_len: int, ranks: int) -> tuple[int, int]:
    """The lengths of a rank's early and late chunk, the same for all; they differ where T / s is odd."""
    each = seq_len // ranks
    return each - each // 2, each // 2


def columns(seq_len: int, rank: int, ranks: int) -> np.ndarray:
    """The places in a row of the T / s tokens that a rank has, ascending, int64.

    A rank's inputs and targets are ``x[:, columns(...)]`` and ``y[:, columns(...)]``: targets are those of
    the whole row, so that a chunk's last token is followed by the first one of the next chunk, as ever.

    Args:
        seq_len: T, a multiple of ``ranks``.
        rank: 0 <= rank < ranks, the place along `Mesh.sequence`.
        ranks: s.
    """
    return np.concatenate([np.array(one, np.int64) for one in own_chunks(seq_len, rank, ranks)])


def own_chunks(seq_len: int, rank: int, ranks: int) -> tuple[range, range]:
    """A rank's early and late chunk, as places in a row."""
    early, late = chunks(seq_len, ranks)
    first, second = rank * early, ranks * early + (ranks - 1 - rank) * late
    return range(first, first + early), range(second, second + late)


def seen(seq_len: int, rank: int, source: int, ranks: int) -> Seen:
    """What of another rank's tokens a rank's own look at: everything in the product of two slices.

    An earlier rank's late chunk is after both of mine, and its early one before both. Of a later rank, both
    chunks lie between mine.
    """
    early, late = chunks(seq_len, ranks)
    assert source != rank, "among its own tokens a rank needs a mask"
    if source < rank:
        return Seen(slice(0, early + late), slice(0, early))
    return Seen(slice(early, early + late), slice(0, early + late))
