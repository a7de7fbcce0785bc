"""Options that a `Trainer` takes by name, checked as flags are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tf_dist.config import check_option
from tf_dist.errors import UsageError
from tf_dist.spelling import did_you_mean
from tf_dist.strategies.registry import FLAT_OPTIONS
from tf_dist.training.pipeline import Pipeline

COMPRESSION = ("compression", *(name for name in FLAT_OPTIONS if name.startswith("compression_")))
STRATEGY = tuple(name for name in FLAT_OPTIONS if name not in COMPRESSION)


def flat_options(
    zero_stage: int,
    local: Mapping[str, Any] | None,
    asynchrony: Mapping[str, Any] | None,
    compression: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The options of a strategy that is named, as `tf_dist.strategies.registry.strategy_of` takes them.

    Raises:
        UsageError: there is no such option, or no such value.
    """
    found: dict[str, Any] = {"zero_stage": zero_stage}
    for group, given, known in (
        ("local", local, STRATEGY),
        ("asynchrony", asynchrony, STRATEGY),
        ("compression", compression, COMPRESSION),
    ):
        found |= _checked(group, given or {}, known)
    return found


def pipeline_of(given: Mapping[str, Any] | None) -> Pipeline:
    """The options of a pipeline.

    Raises:
        UsageError: there is no such option, or no such value.
    """
    return Pipeline(**_checked("pipeline", given or {}, [field.name for field in fields(Pipeline)]))


def _checked(group: str, given: Mapping[str, Any], known: Any) -> dict[str, Any]:
    for name, value in given.items():
        if name not in known:
            near = did_you_mean(str(name), known)
            raise UsageError(f"{group} has no option {name!r}: {', '.join(known)}{near}")
        check_option(name, value)
    return dict(given)
