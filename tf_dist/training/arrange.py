"""From a mesh and what was asked for to what this rank does: its replica, its passes, its sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras

from tf_dist.comm.base import Order
from tf_dist.errors import UsageError
from tf_dist.parallel import buckets, carrier
from tf_dist.parallel.mesh import DATA, Mesh, leaves_of
from tf_dist.parallel.parts import block
from tf_dist.parallel.tree import BlockSum, order
from tf_dist.parallel.updates import UPDATES, Update
from tf_dist.training.passes import Passes
from tf_dist.training.pipeline import Pipeline, PipelinePasses, PipelineReplica
from tf_dist.training.replica import Replica, Weights
from tf_dist.training.shared_rows import passes_of_rows
from tf_dist.training.tuning import talks_inside
from tf_dist.training.whole import whole_norm

PIPELINE_OPTIONS = (
    "pipeline_schedule", "pipeline_cuts", "virtual_stages", "micro_batches_in_flight", "recompute",
)  # fmt: skip

NO_XLA = "the layers of a pipeline's rank are compiled in steps"


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
    pipeline_schedule: str = "1f1b"
    pipeline_cuts: str = ""
    virtual_stages: int = 2
    micro_batches_in_flight: int = 0
    recompute: str = "off"


class Arrangement(NamedTuple):
    """What a rank works with.

    micro_batches: the numbers of those of a step that are this rank's, in order. order: of the sums over
    `Mesh.replicas`. said: how sums are carried. no_xla: why XLA cannot compile this rank's work; empty
    where it can.
    """

    replica: Replica | PipelineReplica
    passes: Passes
    update: Update
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
    if wishes.update not in UPDATES:
        raise UsageError(f"unknown update {wishes.update!r}: {', '.join(UPDATES)}")
    mine = block(count, mesh.at[DATA], mesh.shape[DATA])
    replica: Replica | PipelineReplica
    if mesh.pipeline.size > 1:
        replica = PipelineReplica(model, optimizer, mesh, rows, seq_len, seed, _pipeline(wishes), len(mine))
    else:
        replica = Replica(model, optimizer, rows, seq_len // mesh.sequence.size, seed)
    replica.norm = whole_norm(replica, model.trainable_variables, mesh)
    _check_optimizer(replica, mesh)
    leaves, blocks = leaves_of(count, mesh)
    terms, comm = order(leaves, blocks), mesh.replicas
    chosen = carrier.choose(
        comm, replica.parameters, terms, wishes.allreduce, wishes.chunk_bytes, wishes.measure
    )
    update = UPDATES[wishes.update]
    if isinstance(replica, PipelineReplica):
        pipelined = PipelinePasses(replica, leaves, blocks[comm.rank], chosen.buffers)
        return Arrangement(replica, pipelined, update, mine, terms, chosen.said, NO_XLA)
    sums = BlockSum(replica.parameters, leaves, blocks[comm.rank], chosen.buffers)
    why_not = "" if wishes.update == "allreduce" else "only --update allreduce sums everywhere"
    overlap = buckets.choose(comm, replica.layout, terms, sums, wishes.overlap, why_not)
    passes = passes_of_rows(replica, mine, sums, overlap, mesh)
    return Arrangement(replica, passes, update, mine, terms, chosen.said, talks_inside(model))


def _pipeline(wishes: Wishes) -> Pipeline:
    return Pipeline(
        wishes.pipeline_schedule,
        wishes.pipeline_cuts,
        wishes.virtual_stages,
        wishes.micro_batches_in_flight,
        wishes.recompute == "on",
    )


def _check_optimizer(replica: Weights, mesh: Mesh) -> None:
    """Refuse an optimizer that looks at whole variables, or at all of them, where no rank has them."""
    reason = replica.optimizer_step.reason
    if reason and not mesh.plain:
        raise UsageError(
            f"{mesh}: a weight's step must depend on nothing but its own gradient and state, and {reason}. "
            "Use adamw, adam, sgd, lion or another elementwise optimizer of Keras, without options that "
            "look at whole variables"
        )
