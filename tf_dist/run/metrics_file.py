"""``metrics.jsonl``: a row of numbers for each log step, each step once, in the order of the steps.

The file may have been edited, written to by an older job, or cut in the middle of a row when a job was
killed: a line that is not a row is ignored.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from tf_dist import untrusted_files
from tf_dist.atomic_io import write_in_place_of
from tf_dist.errors import LaunchError

METRICS = (
    "step", "epoch", "loss", "val_loss", "perplexity", "bits_per_byte", "learning_rate", "grad_norm",
    "tokens", "tokens_per_s", "step_s", "comm_s", "wait_s", "elapsed_s", "bad_steps",
)  # fmt: skip
# Steps are counted in int64.
LARGEST_STEP = 1 << 62


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a ``metrics.jsonl``. Raises `OSError`."""
    return [row for row in map(_row, untrusted_files.lines(path)) if row is not None]


def keep_rows(path: Path, step: int, left: Path | None = None) -> tuple[bool, int]:
    """Keep the rows up to a step, and of several rows of one step the last.

    Args:
        path: of a ``metrics.jsonl``; may be missing.
        step: the last one that is kept.
        left: file for the other lines; None: they are dropped.

    Returns:
        Whether there is a row of this very step, and the number of lines that were not kept.

    Raises:
        LaunchError: it cannot be read or written.
    """
    if not os.path.lexists(path):
        return False, 0
    try:
        steps = [-1 if row is None else int(row["step"]) for row in map(_row, untrusted_files.lines(path))]
        kept, lowest = [False] * len(steps), step + 1
        for number in range(len(steps) - 1, -1, -1):
            if 0 <= steps[number] < lowest:
                kept[number], lowest = True, steps[number]
        if not all(kept):
            if left is not None:
                write_in_place_of(left, _copier(path, [not one for one in kept]), LaunchError)
            write_in_place_of(path, _copier(path, kept), LaunchError)
        return any(one and s == step for one, s in zip(kept, steps, strict=True)), kept.count(False)
    except OSError as error:
        raise LaunchError(
            f"cannot read {path}: {error.strerror}. Move it away, and a new one will be written"
        ) from error


def _copier(path: Path, wanted: list[bool]) -> Callable[[BinaryIO], None]:
    def copy(file: BinaryIO) -> None:
        for line, is_wanted in zip(untrusted_files.lines(path), wanted, strict=True):
            if is_wanted:
                file.write(line if line.endswith(b"\n") else line + b"\n")

    return copy


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = untrusted_files.parsed_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not all(_is_number(row.get(key)) for key in METRICS):
        return None
    step = row.get("step")
    return row if isinstance(step, int) and 0 <= step < LARGEST_STEP else None


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def is_no_number(value: object) -> bool:
    """Whether it is NaN or infinite, as in skipped steps: JSON cannot represent it."""
    return isinstance(value, float) and not math.isfinite(value)
