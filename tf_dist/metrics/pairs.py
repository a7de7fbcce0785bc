"""Shared by all metrics: checked pairs of predictions and references, exact means, optional libraries."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TypeVar

from tf_dist.errors import BackendMissing, DataError

P = TypeVar("P")
R = TypeVar("R")


def paired(predictions: Sequence[P], references: Sequence[R], metric: str) -> list[tuple[P, R]]:
    """Each prediction with its reference.

    Args:
        predictions: one for each row.
        references: one for each row, in the same order.
        metric: its name, for error messages.

    Raises:
        DataError: no rows, or not as many predictions as references; on the rank that computes.
    """
    if len(predictions) != len(references):
        raise DataError(
            f"{metric}: {len(predictions):,} predictions and {len(references):,} references. "
            "Each row needs one of both."
        )
    if not predictions:
        raise DataError(f"{metric} of no rows is undefined. Hold out at least one row.")
    return list(zip(predictions, references, strict=True))


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean of at least one value: an exact sum (`math.fsum`), one division."""
    listed = list(values)
    return math.fsum(listed) / len(listed)


def library(module: str, metric: str) -> ModuleType:
    """A library that some metrics need, imported when one of them is computed.

    Args:
        module: what to import; its first part is the name on PyPI.
        metric: who needs it.

    Raises:
        BackendMissing: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise BackendMissing(
            f"metric {metric} needs {package}: pip install 'tf_dist[tasks]' (Python said: {error})"
        ) from error
