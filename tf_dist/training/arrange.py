"""From a mesh and a strategy to what this rank does: its replica, its passes, its sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras

from tf_dist.comm.base import WINDOW
from tf_dist.comm.sums import Order
from tf_dist.degrees import AXES
from tf_dist.errors import UsageError
from tf_dist.parallel import buckets, carrier
from tf_dist.parallel.mesh import Mesh, leaves_of
from tf_dist.parallel.tree import BlockSum, one_each, order
from tf_dist.strategies.base import Setting, Strategy
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
from tf_dist.training.whole import whole_norm

NO_XLA = "the layers of a pipeline's rank are compiled in steps"


class Wishes(NamedTuple):
    """What was asked for, by the names of the options of `tf_dist.config.Config`.

    measure: whether sums are timed to find out what carries them best.
    """

    allreduce: str = "auto"
    chunk_bytes: int = 0
    measure: bool = True
    overlap: str = "auto"
    pipeline: Pipeline = Pipeline()


@dataclass
class Context:
    """`tf_dist.strategies.base.Context` of a rank."""

    mesh: Mesh
    replica: Any
    optimizer: Any
    micro_batches: range
    count: int
    measure: bool

    def learning_rate_setter(self) -> Callable[[int, float], None]:
        """As in `tf_dist.strategies.base.Context`."""
        return PushRate(self.optimizer)

    def frozen_adam(self) -> Callable[[int], Any]:
        """As in `tf_dist.strategies.base.Context`."""
        check_adam(self.optimizer)
        return lambda steps: FrozenAdam(self.replica, steps)


class Arrangement(NamedTuple):
    """What a rank works with.

    micro_batches: the numbers of those of a step that are this rank's, in order. order: of the sums over
    `Mesh.replicas`. said: how sums are carried. no_xla: why XLA cannot compile this rank's work; empty
    where it can.
    """

    replica: Replica | PipelineReplica
    passes: Passes
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
    strategy: Strategy,
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
        strategy: not set up yet.
        wishes: what was asked for beside it.

    Raises:
        UsageError: it does not fit.
    """
    shared = dict(zip(AXES, (mesh.tensor.size, mesh.pipeline.size, mesh.sequence.size), strict=True))
    strategy.check(Setting({name: degree for name, degree in shared.items() if degree > 1}))
    mine, sizes = strategy.assignment(count, mesh), (rows, seq_len // mesh.sequence.size, seed)
    sharding = strategy.traits.sharding
    replica = _replica(model, optimizer, mesh, sizes, sharding, wishes.pipeline, len(mine))
    replica.norm = whole_norm(replica, model.trainable_variables, mesh)
    _check_optimizer(replica, mesh)
    strategy.setup(Context(mesh, replica, optimizer, mine, count, wishes.measure))
    if not strategy.traits.lockstep:
        return _nothing_summed(replica, mesh, mine, count, strategy)
    if sharding > 1:
        return _summed_at_once(replica, mesh, mine, count, strategy)
    return _summing(replica, mesh, mine, count, strategy, wishes)


def _replica(
    model: keras.Model,
    optimizer: Any,
    mesh: Mesh,
    sizes: tuple[int, int, int],
    sharding: int,
    pipeline: Pipeline,
    mine: int,
) -> Any:
    """What this rank has of the model and its optimizer."""
    if mesh.pipeline.size > 1:
        kind = ShardedPipelineReplica if sharding else PipelineReplica
        return kind(model, optimizer, mesh, *sizes, pipeline, mine)
    if sharding == 3:
        return GatheredReplica(model, optimizer, *sizes, mesh)
    if sharding:
        return ShardedReplica(model, optimizer, *sizes, mesh)
    return Replica(model, optimizer, *sizes)


def _summing(
    replica: Any, mesh: Mesh, mine: range, count: int, strategy: Strategy, wishes: Wishes
) -> Arrangement:
    """Each rank sums the gradients of its own micro-batches, which are neighbours; then all ranks do."""
    leaves, blocks = leaves_of(count, mesh)
    terms, comm, traits = order(leaves, blocks), mesh.replicas, strategy.traits
    chosen = carrier.Carrier(None, strategy.describe())
    if traits.sums_gradients:
        chosen = carrier.choose(
            comm, replica.parameters, terms, wishes.allreduce, wishes.chunk_bytes, wishes.measure
        )
        chosen = chosen._replace(said="; ".join(filter(None, [chosen.said, strategy.describe()])))
    if mesh.pipeline.size > 1:
        pipelined = PipelinePasses(replica, leaves, blocks[comm.rank], chosen.buffers)
        return Arrangement(replica, pipelined, mine, terms, chosen.said, NO_XLA)
    sums = BlockSum(replica.parameters, leaves, blocks[comm.rank], chosen.buffers)
    why_not = "" if traits.overlaps else f"strategy {strategy} needs all of them at once"
    if comm.survives:
        why_not = "a rank may die meanwhile"
    overlap = buckets.choose(comm, replica.layout, terms, sums, wishes.overlap, why_not)
    passes = passes_of_rows(replica, mine, sums, overlap, mesh)
    return Arrangement(replica, passes, mine, terms, chosen.said, talks_inside(replica.model))


def _nothing_summed(replica: Any, mesh: Mesh, mine: range, count: int, strategy: Strategy) -> Arrangement:
    """No gradient is summed over all ranks."""
    sums = BlockSum(replica.parameters, mine or range(count), mine)
    passes = passes_of_rows(replica, mine, sums, buckets.Overlap(None, ""), mesh)
    no_xla = talks_inside(replica.model)
    return Arrangement(replica, passes, mine, one_each(mesh.all.size), strategy.describe(), no_xla)


def _summed_at_once(replica: Any, mesh: Mesh, mine: range, count: int, strategy: Strategy) -> Arrangement:
    """All ranks add each micro-batch's gradient at once."""
    passes: Passes
    if strategy.traits.sharding == 3:
        passes = GatheringPasses(replica, count, mesh.speaks)
        no_xla = "weights come and go while a step is computed"
    else:
        passes = LeavingPasses(replica, count, mesh.replicas, mesh.speaks)
        no_xla = "gradients leave during the backward pass"
    leaves, blocks = leaves_of(count, mesh)
    return Arrangement(replica, passes, mine, order(leaves, blocks), strategy.describe(), no_xla)


def rearranged(old: Arrangement, mesh: Mesh, count: int, strategy: Strategy) -> Arrangement:
    """What is to do where some ranks have died; a collective.

    Args:
        old: what this rank has worked with.
        mesh: the ranks that are left.
        count: micro-batches of a global batch.
        strategy: goes on.
    """
    mine = strategy.assignment(count, mesh)
    if not strategy.traits.lockstep:
        return _nothing_summed(old.replica, mesh, mine, count, strategy)
    # As in `_summing`, carried as before, with what is compiled already.
    replica, comm = old.replica, mesh.replicas
    assert isinstance(replica, Replica)  # all ranks have everything (`InPlace.can`)
    leaves, blocks = leaves_of(count, mesh)
    terms = order(leaves, blocks)
    buffers = comm.term_buffers(replica.parameters, terms) if comm.carried_by == WINDOW else None
    sums = BlockSum(replica.parameters, leaves, blocks[comm.rank], buffers)
    passes = passes_of_rows(replica, mine, sums, buckets.Overlap(None, ""), mesh)
    return old._replace(passes=passes, micro_batches=mine, order=terms)


def _check_optimizer(replica: Weights, mesh: Mesh) -> None:
    """Refuse an optimizer that looks at whole variables, or at all of them, where no rank has them."""
    reason = replica.optimizer_step.reason
    if reason and not mesh.plain:
        raise UsageError(
            f"{mesh}: a weight's step must depend on nothing but its own gradient and state, and {reason}. "
            "Use adamw, adam, sgd, lion or another elementwise optimizer of Keras, without options that "
            "look at whole variables"
        )
