"""Format lists of ranks, and of names, for messages."""

from __future__ import annotations

from collections.abc import Sequence


def named(ranks: Sequence[int]) -> str:
    """``rank 1``, or ``ranks 0, 2``."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))


def counted(ranks: int) -> str:
    """``1 rank``, or ``3 ranks``."""
    return f"{ranks} rank{'s' * (ranks > 1)}"


def some(names: Sequence[str], most: int = 4) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
