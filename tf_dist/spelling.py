"""Nearest known word, for "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The nearest known word as the end of an error message, or nothing."""
    near = nearest(word, known)
    return f". Did you mean {near!r}?" if near else ""


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that is most like another, or an empty string."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), "")
