"""Whether all ranks hold the same bits: a digest of each variable, a vote, and who lost it."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.comm.words import named
from tf_dist.errors import LaunchError


class Split(NamedTuple):
    """What is not the same everywhere; ``astray`` is empty where no majority can tell who is wrong."""

    place: int
    groups: list[list[int]]
    astray: list[int]

    @property
    def who(self) -> str:
        """``rank 2 differs from ranks 0, 1``, or ``rank 0 and rank 1 differ``."""
        if not self.astray:
            return " and ".join(named(group) for group in self.groups) + " differ"
        others = named([rank for group in self.groups for rank in group if rank not in self.astray])
        return f"{named(self.astray)} {'differs' if len(self.astray) == 1 else 'differ'} from {others}"

    def renamed(self, ranks: Sequence[int]) -> Split:
        """The same with rank i called ``ranks[i]``."""
        groups = [[ranks[rank] for rank in group] for group in self.groups]
        return Split(self.place, groups, [ranks[rank] for rank in self.astray])


def splits(variables: Sequence[Any], comm: Comm, held: bool = True) -> list[Split]:
    """The variables that are not the same on all ranks that have them, by place; a collective.

    One number crosses where all are equal, and one for each variable where they are not.

    Args:
        variables: Keras variables, in one order on all ranks.
        comm: the ranks.
        held: whether this rank has them.

    Raises:
        LaunchError: the ranks have different numbers of variables.
    """
    digests_N = [digest(variable) for variable in variables] if held else None
    own = None if digests_N is None else zlib.crc32(np.array(digests_N, "<u4").data)
    if len({one for one in comm.allgather_obj(own) if one is not None}) <= 1:
        return []
    everyones = enumerate(comm.allgather_obj(digests_N))
    digests = {rank: theirs for rank, theirs in everyones if theirs is not None}
    if len({len(theirs) for theirs in digests.values()}) > 1:
        raise LaunchError("the ranks have different numbers of variables: not one model")
    columns = list(zip(*digests.values(), strict=True))
    return [
        split(place, dict(zip(digests, column, strict=True)))
        for place, column in enumerate(columns)
        if len(set(column)) > 1
    ]


def digest(variable: Any) -> int:
    """CRC-32 of a variable's bytes: one flipped bit, or any within 32 neighbours, never goes unseen."""
    return zlib.crc32(np.ascontiguousarray(np.asarray(variable.value)).reshape(-1).view(np.uint8).data)


def split(place: int, values: Mapping[int, int]) -> Split:
    """Ranks by value, the largest group first, and those outvoted by more than half of all.

    Args:
        place: of the variable.
        values: of the ranks that have it.
    """
    counts = Counter(values.values()).most_common()
    groups = [[rank for rank, value in values.items() if value == wanted] for wanted, _ in counts]
    outvoted = 2 * counts[0][1] > len(values)
    return Split(place, groups, sorted(rank for group in groups[1:] for rank in group) if outvoted else [])
