"""Validate the metadata of a checkpoint, besides its tensors, before a run resumes from it.

A manifest's checksum proves that it is undamaged, not that we wrote it: anyone can compute a CRC-32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tf_dist.errors import CheckpointError
from tf_dist.untrusted_files import shown

LARGEST_COUNT = 1 << 62


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_COUNT


def _is_amount(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _are_numbers(count: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == count and all(map(_is_number, value))


def _is_pair_of_counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_row(value: Any) -> bool:
    return _are_numbers(4)(value) and math.isfinite(value[3])


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_spikes(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    skips, losses = value.get("skips", []), value.get("losses", [])
    if not (isinstance(skips, list) and isinstance(losses, list)):
        return False
    return all(map(_is_pair_of_counts, skips)) and all(map(_is_number, losses))


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_tuned(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("xla"), bool)


# Position in the training; every checkpoint of a `Trainer` has the first two.
POSITION: Mapping[str, Callable[[Any], bool]] = {"tokens": _is_count, "elapsed_s": _is_amount}
# Additional facts of a job; older checkpoints lack some.
OPTIONAL: Mapping[str, Callable[[Any], bool]] = {
    "tuned": _is_tuned,
    "bad_steps": _is_pair_of_counts,
    "spikes": _is_spikes,
    "row": _is_row,
    "last_row": _is_mapping,
    "bits_depend_on": _is_mapping,
    "versions": _is_mapping,
    "val_loss": _or_none(_is_number),
    "val_loss_step": _or_none(_is_count),
}
OF_A_JOB: Mapping[str, Callable[[Any], bool]] = {
    "config": _is_mapping,
    "content_sha256": _or_none(lambda value: isinstance(value, str)),
    "val_loss": _or_none(_is_number),
}


def check_position(facts: Mapping[str, Any], path: Path) -> None:
    """Raise `CheckpointError` unless a trainer can resume from the facts of a checkpoint."""
    _check(facts, path, POSITION)


def check_facts(facts: Mapping[str, Any], path: Path) -> None:
    """Raise `CheckpointError` unless a job can resume from the facts of a checkpoint."""
    _check(facts, path, {**POSITION, **OF_A_JOB})


def _check(facts: Mapping[str, Any], path: Path, needed: Mapping[str, Callable[[Any], bool]]) -> None:
    given = {name: check for name, check in OPTIONAL.items() if name in facts}
    for name, is_right in {**needed, **given}.items():
        if name not in facts:
            raise CheckpointError(f"{path} lacks {name!r}, which a run goes on with")
        if not is_right(facts[name]):
            raise CheckpointError(f"{path}: {name} is {shown(facts[name])}, which cannot be")
