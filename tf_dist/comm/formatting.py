"""Format lists of ranks for messages."""

from __future__ import annotations

from collections.abc import Sequence


def named(ranks: Sequence[int]) -> str:
    """``rank 1``, or ``ranks 0, 2``."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))


def counted(ranks: int) -> str:
    """``1 rank``, or ``3 ranks``."""
    return f"{ranks} rank{'s' * (ranks > 1)}"
