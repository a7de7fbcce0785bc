"""Options of updates whose replicas step by themselves and meet now and then, and what they must fit."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tf_dist.errors import UsageError

if TYPE_CHECKING:
    from tf_dist.config import Config

LOCAL = ("local-sgd", "diloco")
# Options, and the updates to which they mean something.
BELONGS_TO = {
    "sync_every": LOCAL,
    "sync_warmup_steps": LOCAL,
    "outer_lr": ("diloco",),
    "outer_momentum": ("diloco",),
    "outer_fragments": LOCAL,
    "outer_precision": LOCAL,
}


def check_meetings(config: Config) -> None:
    """Refuse options of another update than the one that was chosen, and values that cannot be.

    Raises:
        UsageError: with the reason, and what would do.
    """
    for field in dataclasses.fields(config):
        updates, value = BELONGS_TO.get(field.name), getattr(config, field.name)
        if updates and config.update not in updates and value != field.default:
            raise UsageError(
                f"{field.name} is {value}, but update {config.update} has no use for it: it belongs to "
                f"update {' and '.join(updates)}. Leave it out, or choose one of these"
            )
    if config.update in LOCAL:
        _check_values(config)


def _check_values(config: Config) -> None:
    if config.outer_lr <= 0:
        raise UsageError(f"outer_lr is {config.outer_lr:g}: with 0 no meeting changes a weight; use 0.7")
    if config.outer_momentum >= 1:
        raise UsageError(f"outer_momentum is {config.outer_momentum:g}: it must be below 1; use 0.9")
    if config.outer_fragments > config.sync_every:
        raise UsageError(
            f"outer_fragments {config.outer_fragments} is more than sync_every {config.sync_every}: each "
            f"part needs a step of its own. Use at most {config.sync_every} fragments"
        )
    if config.sequence_parallel > 1:
        raise UsageError(
            f"sequence_parallel {config.sequence_parallel} with update {config.update}: ranks that share "
            "rows must sum their gradients in every step. Use sequence_parallel 1, or update allreduce"
        )
    if config.backend == "horovod" and config.outer_precision != "float32":
        raise UsageError(
            f"backend horovod cannot carry outer_precision {config.outer_precision}: use backend mpi"
        )
