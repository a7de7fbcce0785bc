"""Check the arguments of a `Trainer`: sizes, and options that are given by name, as flags are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tf_dist.config import FIELDS, default_micro_batch
from tf_dist.config.pipeline import PipelineOptions
from tf_dist.errors import UsageError
from tf_dist.options import Options, check_value
from tf_dist.spelling import did_you_mean
from tf_dist.strategies.registry import FLAT_OPTIONS

COMPRESSION = ("compression", *(name for name in FLAT_OPTIONS if name.startswith("compression_")))
STRATEGY = tuple(name for name in FLAT_OPTIONS if name not in COMPRESSION)


def flat_options(
    zero_stage: int,
    local: Mapping[str, Any] | None,
    asynchrony: Mapping[str, Any] | None,
    compression: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The options of a strategy given by name, for `tf_dist.strategies.registry.strategy_of`.

    Raises:
        UsageError: an unknown option, or an invalid value.
    """
    found: dict[str, Any] = {"zero_stage": zero_stage}
    for group, given, known in (
        ("local", local, STRATEGY),
        ("asynchrony", asynchrony, STRATEGY),
        ("compression", compression, COMPRESSION),
    ):
        found |= _checked(group, given or {}, known)
    return found


def plain(value: Any) -> Any:
    """The options of a component by name, for comparison between ranks; other values unchanged."""
    return vars(value) if isinstance(value, Options) else value


def pipeline_of(given: PipelineOptions | Mapping[str, Any] | None) -> PipelineOptions:
    """The options of a pipeline, given as an object or by name.

    Raises:
        UsageError: an unknown option, or an invalid value.
    """
    if isinstance(given, PipelineOptions):
        return given
    known = [field.name for field in fields(PipelineOptions)]
    return PipelineOptions(**_checked("pipeline", given or {}, known))


def micro_batch_rows(global_batch_size: int, micro_batch_size: int | None) -> int:
    """B, rows of a micro-batch.

    Raises:
        UsageError: a size below 1, or one that does not divide the global batch.
    """
    if global_batch_size < 1 or (micro_batch_size or 0) < 0:
        raise UsageError(
            f"global_batch_size {global_batch_size}, micro_batch_size {micro_batch_size}: at least 1"
        )
    rows = micro_batch_size or default_micro_batch(global_batch_size)
    if global_batch_size % rows:
        raise UsageError(f"micro_batch_size {rows} does not divide global_batch_size {global_batch_size}")
    return rows


def check_counts(steps: int | None, epochs: int | None, eval_every: int) -> None:
    """Check the numbers given to `Trainer.fit`.

    Raises:
        UsageError: fewer than one step or epoch, or a negative ``eval_every``.
    """
    if min(1 if steps is None else steps, 1 if epochs is None else epochs) < 1 or eval_every < 0:
        raise UsageError(f"steps {steps}, epochs {epochs}: at least 1; eval_every {eval_every}: at least 0")


def _checked(group: str, given: Mapping[str, Any], known: Any) -> dict[str, Any]:
    for name, value in given.items():
        if name not in known:
            near = did_you_mean(str(name), known)
            raise UsageError(f"{group} has no option {name!r}: {', '.join(known)}{near}")
        check_value(name, value, FIELDS[name].metadata)
    return dict(given)
