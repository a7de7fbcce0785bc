"""Kernels that are several matrices beside each other, as those of queries, keys and values."""

from __future__ import annotations

from typing import Any

ATTRIBUTE = "tf_dist_groups"


def groups_of(variable: Any) -> int:
    """How many matrices of equal width a kernel is; 3 for queries, keys and values."""
    return int(getattr(variable, ATTRIBUTE, 1))


def set_groups(variable: Any, groups: int) -> None:
    """Say that a kernel is so many matrices beside each other."""
    setattr(variable, ATTRIBUTE, groups)
