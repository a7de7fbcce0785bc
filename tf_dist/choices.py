"""Options that only some updates or compressions have, and what they must fit."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tf_dist.degrees import in_use
from tf_dist.errors import UsageError

if TYPE_CHECKING:
    from tf_dist.config import Config

# Updates whose replicas step by themselves and meet now and then.
LOCAL = ("local-sgd", "diloco")
# Updates whose ranks do not wait for each other between meetings; the last two log each rank's own numbers.
ALONE = ("easgd", "gossip")
ASYNCHRONOUS = ("downpour", *ALONE)
# Of which all ranks take every step together, and know its loss.
TOGETHER = ("allreduce", "master", "zero")
# Steps between exchanges where none are given.
SYNC_EVERY = {"local-sgd": 8, "diloco": 50, "easgd": 4, "gossip": 1}
COMPRESSIONS = ("bf16", "topk", "powersgd", "onebit")
# Options, and the values of another to which they mean something.
BELONGS_TO = {
    "staleness": ("update", ("downpour",)),
    "staleness_aware": ("update", ("downpour",)),
    "master_trains": ("update", ("downpour", "easgd")),
    "elastic_force": ("update", ("easgd",)),
    "sync_every": ("update", tuple(SYNC_EVERY)),
    "sync_warmup_steps": ("update", LOCAL),
    "outer_lr": ("update", ("diloco",)),
    "outer_momentum": ("update", ("diloco",)),
    "outer_fragments": ("update", LOCAL),
    "outer_precision": ("update", LOCAL),
    "outer_delay": ("update", LOCAL),
    "compression_rank": ("compression", ("powersgd",)),
    "compression_least_rate": ("compression", ("powersgd",)),
    "compression_density": ("compression", ("topk",)),
    "compression_momentum": ("compression", ("topk",)),
    "compression_start": ("compression", COMPRESSIONS),
}


def check_update(config: Config) -> None:
    """Refuse options of another update or compression than was chosen, and values that cannot be.

    Raises:
        UsageError: with the reason, and what would do.
    """
    for field in dataclasses.fields(config):
        other, wanted = BELONGS_TO.get(field.name, ("update", ()))
        value, chosen = getattr(config, field.name), getattr(config, other)
        if wanted and chosen not in wanted and value != field.default:
            raise UsageError(
                f"{field.name} is {value}, but {other} {chosen} has no use for it: it belongs to {other} "
                f"{' and '.join(wanted)}. Leave it out, or choose one of these"
            )
    if config.update in ASYNCHRONOUS:
        _check_asynchronous(config)
    if config.on_spike != "off" and config.update not in TOGETHER:
        raise UsageError(
            f"on_spike is {config.on_spike}, but with update {config.update} not all ranks take each step "
            f"together. Use --update {' or '.join(TOGETHER)}, or --on-spike off"
        )
    if config.update in LOCAL:
        _check_meetings(config)
    if config.compression != "none":
        _check_compression(config)


def _check_asynchronous(config: Config) -> None:
    if shared := in_use(config):
        raise UsageError(
            f"update {config.update} with {' and '.join(shared)}: a worker has the whole model. Use degrees "
            "of 1"
        )
    if config.backend == "horovod":
        raise UsageError(f"backend horovod cannot carry update {config.update}: use backend mpi")
    if config.elastic_force > 1:
        raise UsageError(f"elastic_force is {config.elastic_force:g}: above 1 a spring throws; use 0.2")


def _check_meetings(config: Config) -> None:
    if config.outer_lr <= 0:
        raise UsageError(f"outer_lr is {config.outer_lr:g}: with 0 no meeting changes a weight; use 0.7")
    if config.outer_momentum >= 1:
        raise UsageError(f"outer_momentum is {config.outer_momentum:g}: it must be below 1; use 0.9")
    every = config.sync_every or SYNC_EVERY[config.update]
    check_fragments(every, config.outer_fragments, config.outer_delay, config.outer_precision)
    if config.sequence_parallel > 1:
        raise UsageError(
            f"sequence_parallel {config.sequence_parallel} with update {config.update}: ranks that share "
            "rows must sum their gradients in every step. Use sequence_parallel 1, or update allreduce"
        )
    if config.backend == "horovod" and config.outer_precision != "float32":
        raise UsageError(
            f"backend horovod cannot carry outer_precision {config.outer_precision}: use backend mpi"
        )


def check_fragments(every: int, fragments: int, delay: int, precision: str) -> None:
    """Refuse parts of the weights, and steps during which they travel, that do not fit between meetings.

    Raises:
        UsageError: with the reason, and what would do.
    """
    if fragments > every:
        raise UsageError(
            f"outer_fragments {fragments} is more than sync_every {every}: each part needs a step of its "
            f"own. Use at most {every} fragments"
        )
    if delay > every // fragments:
        raise UsageError(
            f"outer_delay {delay} is more than sync_every {every} / outer_fragments {fragments}: one part "
            f"must have arrived before the next one leaves. Use at most {every // fragments} steps"
        )
    if delay and precision != "float32":
        raise UsageError(
            f"outer_precision {precision} with outer_delay {delay}: what travels during other steps travels "
            "as float32. Leave one of them out"
        )


def _check_compression(config: Config) -> None:
    kind = config.compression
    if config.update != "allreduce":
        raise UsageError(
            f"compression {kind} with update {config.update}: only update allreduce sums gradients that can "
            "be compressed. Use compression none, or update allreduce"
        )
    if shared := in_use(config):
        raise UsageError(
            f"compression {kind} with {' and '.join(shared)}: only gradients of whole models are compressed. "
            "Use degrees of 1, or compression none"
        )
    if not 0 < config.compression_density <= 1:
        raise UsageError(
            f"compression_density is {config.compression_density:g}: a share above 0, at most 1; use 0.01"
        )
    if kind == "onebit" and (config.compression_start < 1 or config.optimizer not in ("adam", "adamw")):
        raise UsageError(
            f"compression onebit with compression_start {config.compression_start} and optimizer "
            f"{config.optimizer}: it needs the variance that adam or adamw has found in some hundred steps "
            "before. Use compression_start 200, optimizer adamw"
        )
    if config.compression_momentum >= 1:
        raise UsageError(f"compression_momentum is {config.compression_momentum:g}: it must be below 1")
    if config.backend == "horovod" and kind != "powersgd":
        raise UsageError(
            f"backend horovod cannot carry compression {kind}: use backend mpi, or compression powersgd"
        )


def check_limits(warn_s: float, abort_s: float) -> None:
    """Check the limits of a wait for other ranks: stall_warn and stall_abort, seconds, 0 for never.

    Raises:
        UsageError: negative, or the job would end before anything was said.
    """
    if warn_s < 0 or abort_s < 0:
        raise UsageError(f"stall_warn is {warn_s:g}, stall_abort {abort_s:g}: seconds, or 0 for never")
    if 0 < abort_s <= warn_s:
        raise UsageError(
            f"stall_abort ({abort_s:g} s) is not beyond stall_warn ({warn_s:g} s): the job would end before "
            f"anybody was warned. Try --stall-abort {10 * warn_s:g}, or 0 for never"
        )
