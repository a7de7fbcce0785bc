"""From a mesh and what was asked for to what this rank does: its replica, its passes, its sums."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import keras

from tf_dist.choices import ALONE, ASYNCHRONOUS, BELONGS_TO, LOCAL, SYNC_EVERY, check_fragments
from tf_dist.comm.base import WINDOW
from tf_dist.comm.sums import Order
from tf_dist.config import Config, check_option, default, did_you_mean
from tf_dist.degrees import share
from tf_dist.errors import UsageError
from tf_dist.parallel import buckets, carrier, zero
from tf_dist.parallel.compress import Compression
from tf_dist.parallel.compressed import Compressed, CompressedMomentum, tried
from tf_dist.parallel.dealing import micro_batches_of_a_unit
from tf_dist.parallel.elastic import Elastic
from tf_dist.parallel.gossip import Gossip
from tf_dist.parallel.local import LocalSteps, Plan
from tf_dist.parallel.mesh import DATA, Mesh, leaves_of
from tf_dist.parallel.scatter import dealt
from tf_dist.parallel.tree import BlockSum, one_each, order
from tf_dist.parallel.updates import UPDATES
from tf_dist.training.downpour import Downpour
from tf_dist.training.frozen_adam import FrozenAdam, check_adam
from tf_dist.training.gathered import GatheredReplica, GatheringPasses
from tf_dist.training.leaving import LeavingPasses
from tf_dist.training.passes import Passes
from tf_dist.training.pipeline import Pipeline, PipelinePasses, PipelineReplica
from tf_dist.training.push_rate import PushRate
from tf_dist.training.replica import Replica, Weights
from tf_dist.training.sharded import ShardedPipelineReplica, ShardedReplica
from tf_dist.training.shared_rows import passes_of_rows
from tf_dist.training.tuning import talks_inside
from tf_dist.training.units import Asynchrony
from tf_dist.training.whole import whole_norm

NAMES = (*UPDATES, "zero", *LOCAL, *ASYNCHRONOUS)

NO_XLA = "the layers of a pipeline's rank are compiled in steps"


# Groups of options of `tf_dist.config.Config`, by the names that they have in a Trainer.
GROUPS: dict[str, Any] = {
    "pipeline": Pipeline,
    "local": Plan,
    "compression": Compression,
    "asynchrony": Asynchrony,
}


def options_of(config: Config) -> dict[str, dict[str, Any]]:
    """The groups of options of a run, as a Trainer takes them."""
    return {
        group: {field.name: getattr(config, field.name) for field in fields(kind)}
        for group, kind in GROUPS.items()
    }


def group_of(group: str, given: Mapping[str, Any], update: str) -> Any:
    """A group of options of a Trainer, checked as flags are.

    Args:
        group: its name, of `GROUPS`.
        given: options by name.
        update: of the Trainer.

    Raises:
        UsageError: there is no such option, or no such value; or it means nothing with this update.
    """
    kind, chosen = GROUPS[group], {"update": update, "compression": given.get("compression", "none")}
    names = [field.name for field in fields(kind)]
    for name, value in given.items():
        if name not in names:
            near = did_you_mean(str(name), names)
            raise UsageError(f"{group} has no option {name!r}: {', '.join(names)}{near}")
        check_option(name, value)
        other, wanted = BELONGS_TO.get(name, ("update", ()))
        if wanted and chosen[other] not in wanted and value != default(name):
            raise UsageError(
                f"{name} is {value}, but {other} {chosen[other]} has no use for it: it belongs to {other} "
                f"{' and '.join(wanted)}. Leave it out, or choose one of these"
            )
    return kind(**given)


class Wishes(NamedTuple):
    """What was asked for, by the names of the options of `tf_dist.config.Config`.

    measure: whether sums are timed to find out what carries them best.
    """

    update: str = "allreduce"
    zero_stage: int = 1
    allreduce: str = "auto"
    chunk_bytes: int = 0
    measure: bool = True
    overlap: str = "auto"
    pipeline: Pipeline = Pipeline()
    local: Plan = Plan()
    compression: Compression = Compression()
    asynchrony: Asynchrony = Asynchrony()


class Arrangement(NamedTuple):
    """What a rank works with.

    micro_batches: the numbers of those of a step that are this rank's, in order. order: of the sums over
    `Mesh.replicas`. said: how sums are carried. no_xla: why XLA cannot compile this rank's work; empty
    where it can.
    """

    replica: Replica | PipelineReplica
    passes: Passes
    update: Any
    micro_batches: range
    order: Order
    said: str
    no_xla: str = ""


def arrange(
    model: keras.Model,
    optimizer: Any,
    mesh: Mesh,
    rows: int,
    seq_len: int,
    seed: int,
    count: int,
    wishes: Wishes,
) -> Arrangement:
    """Decide what this rank does; a collective.

    Args:
        model: of the whole depth.
        optimizer: not built yet, unless every rank has all of its state.
        mesh: all ranks.
        rows: B, of a micro-batch.
        seq_len: T, of a whole row.
        seed: of dropout.
        count: micro-batches of a global batch.
        wishes: what was asked for.

    Raises:
        UsageError: it does not fit.
    """
    if wishes.update not in NAMES:
        raise UsageError(f"unknown update {wishes.update!r}: {', '.join(NAMES)}")
    sizes = (rows, seq_len // mesh.sequence.size, seed)
    if wishes.update == "zero" and wishes.zero_stage > 1:
        return _zero_2_or_3(model, optimizer, mesh, sizes, count, wishes.zero_stage)
    if wishes.update == "downpour":
        return _with_a_master(model, optimizer, mesh, sizes, count, wishes)
    mine = _share(count, mesh, wishes)
    replica: Replica | PipelineReplica
    sharded = wishes.update == "zero"
    if mesh.pipeline.size > 1:
        kind = ShardedPipelineReplica if sharded else PipelineReplica
        replica = kind(model, optimizer, mesh, *sizes, wishes.pipeline, len(mine))
    elif sharded:
        replica = ShardedReplica(model, optimizer, *sizes, mesh)
    else:
        replica = Replica(model, optimizer, *sizes)
    replica.norm = whole_norm(replica, model.trainable_variables, mesh)
    _check_optimizer(replica, mesh)
    return _summing(replica, mesh, mine, count, wishes)


def _summing(
    replica: Replica | PipelineReplica, mesh: Mesh, mine: range, count: int, wishes: Wishes
) -> Arrangement:
    """Each rank sums the gradients of its own micro-batches, which are neighbours; then all ranks do."""
    if wishes.update in ALONE:
        return _alone(replica, mesh, mine, count, wishes)
    leaves, blocks = leaves_of(count, mesh)
    terms, comm = order(leaves, blocks), mesh.replicas
    update, said = _update(replica, mesh, mine, wishes)
    sums_whole = not isinstance(update, Compressed | LocalSteps) or update.first_whole
    chosen = carrier.Carrier(None, said)
    if sums_whole:
        chosen = carrier.choose(
            comm, replica.parameters, terms, wishes.allreduce, wishes.chunk_bytes, wishes.measure
        )
        chosen = chosen._replace(said="; ".join(filter(None, [chosen.said, said])))
    if isinstance(replica, PipelineReplica):
        pipelined = PipelinePasses(replica, leaves, blocks[comm.rank], chosen.buffers)
        return Arrangement(replica, pipelined, update, mine, terms, chosen.said, NO_XLA)
    sums = BlockSum(replica.parameters, leaves, blocks[comm.rank], chosen.buffers)
    why_not = "" if update is UPDATES["allreduce"] else "only --update allreduce sums everywhere"
    if comm.survives:
        why_not = "a rank may die meanwhile"
    if isinstance(update, Compressed):
        why_not = "gradients are compressed when all of them are there"
    overlap = buckets.choose(comm, replica.layout, terms, sums, wishes.overlap, why_not)
    passes = passes_of_rows(replica, mine, sums, overlap, mesh)
    return Arrangement(replica, passes, update, mine, terms, chosen.said, talks_inside(replica.model))


def _share(count: int, mesh: Mesh, wishes: Wishes) -> range:
    """The micro-batches that are this rank's. A master of elastic averaging that does not train has none."""
    rank, size = mesh.at[DATA], mesh.shape[DATA]
    if wishes.update == "easgd" and wishes.asynchrony.master_trains == "off" and size > 1:
        return share(count, rank - 1, size - 1) if rank else range(0)
    return share(count, rank, size)


def _workers(mesh: Mesh, wishes: Wishes) -> int:
    """Ranks that train where one may be a master."""
    return max(1, mesh.all.size - (wishes.asynchrony.master_trains == "off"))


def _refuse_parts(mesh: Mesh, wishes: Wishes) -> None:
    if not mesh.plain:
        raise UsageError(f"{mesh}: update {wishes.update} needs all ranks along the data axis")


def _nothing_summed(replica: Any, mesh: Mesh, mine: range, count: int, update: Any) -> Arrangement:
    """No gradient is summed over all ranks."""
    sums = BlockSum(replica.parameters, mine or range(count), mine)
    passes = passes_of_rows(replica, mine, sums, buckets.Overlap(None, ""), mesh)
    no_xla = talks_inside(replica.model)
    return Arrangement(replica, passes, update, mine, one_each(mesh.all.size), update.said, no_xla)


def rearranged(old: Arrangement, mesh: Mesh, count: int, wishes: Wishes) -> Arrangement:
    """What is to do where some ranks have died; a collective.

    Args:
        old: what this rank has worked with.
        mesh: the ranks that are left.
        count: micro-batches of a global batch.
        wishes: what was asked for.
    """
    if wishes.update not in ASYNCHRONOUS:
        return _summing_again(old, mesh, count, wishes)
    mine = _share(count, mesh, wishes) if wishes.update in ALONE else range(0)
    return _nothing_summed(old.replica, mesh, mine, count, old.update)


def _summing_again(old: Arrangement, mesh: Mesh, count: int, wishes: Wishes) -> Arrangement:
    """`_summing` of the ranks that are left, carried as before, with what is compiled already."""
    mine, replica, comm = _share(count, mesh, wishes), old.replica, mesh.replicas
    assert isinstance(replica, Replica)  # all ranks have everything (`InPlace.can`)
    leaves, blocks = leaves_of(count, mesh)
    terms = order(leaves, blocks)
    buffers = comm.term_buffers(replica.parameters, terms) if comm.carried_by == WINDOW else None
    sums = BlockSum(replica.parameters, leaves, blocks[comm.rank], buffers)
    passes = passes_of_rows(replica, mine, sums, buckets.Overlap(None, ""), mesh)
    return old._replace(passes=passes, micro_batches=mine, order=terms)


def _alone(replica: Any, mesh: Mesh, mine: range, count: int, wishes: Wishes) -> Arrangement:
    """Every rank trains by itself."""
    _refuse_parts(mesh, wishes)
    every = wishes.local.sync_every or SYNC_EVERY[wishes.update]
    given = (mesh.all, replica.parameters, mine, every)
    force = wishes.asynchrony.elastic_force or 0.9 / _workers(mesh, wishes)
    update = Elastic(*given, force) if wishes.update == "easgd" else Gossip(*given)
    return _nothing_summed(replica, mesh, mine, count, update)


def _with_a_master(
    model: keras.Model, optimizer: Any, mesh: Mesh, sizes: tuple[int, int, int], count: int, wishes: Wishes
) -> Arrangement:
    """Rank 0 deals out micro-batches, so that none are a rank's own."""
    _refuse_parts(mesh, wishes)
    options, replica = wishes.asynchrony, Replica(model, optimizer, *sizes)
    replica.norm = whole_norm(replica, model.trainable_variables, mesh)
    size = micro_batches_of_a_unit(count, _workers(mesh, wishes))
    update = Downpour(replica, mesh, count, size, options)
    if options.staleness:
        update.set_rates(PushRate(optimizer))
    return _nothing_summed(replica, mesh, range(0), count, update)


def _update(replica: Weights, mesh: Mesh, mine: range, wishes: Wishes) -> tuple[Any, str]:
    """The update, and a line for people where it does not sum all gradients as they are."""
    if wishes.compression.compression != "none":
        return _compressed(replica, mesh, wishes)
    if wishes.update in UPDATES:
        return UPDATES[wishes.update], ""
    if wishes.update == "zero":
        return zero.STAGES[1], ""
    if mesh.sequence.size > 1:
        raise UsageError(f"{mesh}: update {wishes.update} needs ranks with rows of their own")
    plan = replace(wishes.local, sync_every=wishes.local.sync_every or SYNC_EVERY[wishes.update])
    check_fragments(plan.sync_every, plan.outer_fragments, plan.outer_delay, plan.outer_precision)
    if wishes.update == "local-sgd":  # the mean of the weights
        plan = replace(plan, outer_lr=1.0, outer_momentum=0.0)
    update = LocalSteps(plan, replica.parameters, mine)
    return update, update.said


def _compressed(replica: Weights, mesh: Mesh, wishes: Wishes) -> tuple[Compressed, str]:
    """Compressed sums, and a warning where they take longer than plain ones; a collective."""
    options = wishes.compression
    if wishes.update != "allreduce" or not mesh.plain:
        raise UsageError(
            f"compression {options.compression} with update {wishes.update} on {mesh}: only sums of update "
            "allreduce over ranks along data are compressed"
        )
    compressor = options.compressor(replica.layout.shapes)
    said = f"compressed by {options.compression}"
    if mesh.all.size > 1 and wishes.measure:
        took = tried(compressor, mesh.all)
        said += f", {took['compressed_ms']:.2f} ms (plain, by messages, {took['plain_ms']:.2f} ms)"
        if took["compressed_ms"] > took["plain_ms"] and mesh.all.rank == 0:
            warnings.warn(f"{said}: it costs more than it saves here. Use --compression none", stacklevel=2)
    if options.compression != "onebit":
        return Compressed(compressor, options.compression_start), said
    check_adam(replica.optimizer)
    if options.compression_start < 1:
        raise UsageError(
            f"compression_start is {options.compression_start}: onebit needs the variance that Adam has "
            "found in some hundred steps before it is frozen. Use --compression-start 200"
        )
    frozen = partial(FrozenAdam, replica, options.compression_start)
    return CompressedMomentum(compressor, options.compression_start, frozen), said


def _zero_2_or_3(
    model: keras.Model, optimizer: Any, mesh: Mesh, sizes: tuple[int, int, int], count: int, stage: int
) -> Arrangement:
    """All ranks add each micro-batch's gradient at once, so micro-batches are dealt out by turns."""
    if stage not in zero.STAGES:
        raise UsageError(
            f"zero_stage is {stage}: 1 (optimizer state), 2 (also gradients) or 3 (also weights)"
        )
    if not mesh.plain:
        raise UsageError(
            f"{mesh}: --zero-stage {stage} needs all ranks along the data axis. Use --zero-stage 1, or "
            "leave --tensor-parallel, --pipeline-parallel and --sequence-parallel at 1"
        )
    replica: GatheredReplica | ShardedReplica
    passes: Passes
    if stage == 3:
        replica = GatheredReplica(model, optimizer, *sizes, mesh)
        passes = GatheringPasses(replica, count, mesh.speaks)
        why = "weights come and go while a step is computed"
    else:
        replica = ShardedReplica(model, optimizer, *sizes, mesh)
        passes = LeavingPasses(replica, count, mesh.replicas, mesh.speaks)
        why = "gradients leave during the backward pass"
    replica.norm = whole_norm(replica, model.trainable_variables, mesh)
    mine = dealt(count, mesh.at[DATA], mesh.shape[DATA])
    leaves, blocks = leaves_of(count, mesh)
    update: Any = zero.STAGES[stage]
    said = "by their owners, as they are made"
    return Arrangement(replica, passes, update, mine, order(leaves, blocks), said, why)


def _check_optimizer(replica: Weights, mesh: Mesh) -> None:
    """Refuse an optimizer that looks at whole variables, or at all of them, where no rank has them."""
    reason = replica.optimizer_step.reason
    if reason and not mesh.plain:
        raise UsageError(
            f"{mesh}: a weight's step must depend on nothing but its own gradient and state, and {reason}. "
            "Use adamw, adam, sgd, lion or another elementwise optimizer of Keras, without options that "
            "look at whole variables"
        )
