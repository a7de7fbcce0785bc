"""Compare replicas bit for bit: a digest of each variable, a majority vote, and the outvoted ranks."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tf_dist.comm.formatting import named
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import LaunchError


class Divergence(NamedTuple):
    """A variable that differs between ranks; ``outvoted`` is empty if there is no majority."""

    place: int
    groups: list[list[int]]
    outvoted: list[int]

    @property
    def who(self) -> str:
        """``rank 2 differs from ranks 0, 1``, or ``rank 0 and rank 1 differ``."""
        if not self.outvoted:
            return " and ".join(named(group) for group in self.groups) + " differ"
        others = named([rank for group in self.groups for rank in group if rank not in self.outvoted])
        return f"{named(self.outvoted)} {'differs' if len(self.outvoted) == 1 else 'differ'} from {others}"

    def renamed(self, ranks: Sequence[int]) -> Divergence:
        """The same with rank i renamed to ``ranks[i]``."""
        groups = [[ranks[rank] for rank in group] for group in self.groups]
        return Divergence(self.place, groups, [ranks[rank] for rank in self.outvoted])


def splits(variables: Sequence[Any], comm: Comm, held: bool = True) -> list[Divergence]:
    """Find the variables that differ between the ranks that have them, by index; a collective.

    Ranks exchange one number if all are equal, and one per variable if they are not.

    Args:
        variables: Keras variables, in one order on all ranks.
        comm: the ranks.
        held: whether this rank has them.

    Raises:
        LaunchError: on every rank: the ranks have different numbers of variables.
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
    """CRC-32 of a variable's bytes: detects every flipped bit, and every error burst of up to 32 bits."""
    return zlib.crc32(np.ascontiguousarray(np.asarray(variable.value)).reshape(-1).view(np.uint8).data)


def split(place: int, values: Mapping[int, int]) -> Divergence:
    """Group ranks by value, the largest group first, with those outvoted by more than half of all.

    Args:
        place: index of the variable.
        values: of the ranks that have it.
    """
    counts = Counter(values.values()).most_common()
    groups = [[rank for rank, value in values.items() if value == wanted] for wanted, _ in counts]
    outvoted = 2 * counts[0][1] > len(values)
    return Divergence(
        place, groups, sorted(rank for group in groups[1:] for rank in group) if outvoted else []
    )
