"""Build this rank's replica, model runner and gradient reduction from the mesh and the strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras

from tf_dist.comm.transport.base import WINDOW
from tf_dist.comm.transport.reduction_order import ReductionOrder
from tf_dist.config.parallelism import ParallelismOptions
from tf_dist.config.performance import PerformanceOptions
from tf_dist.config.pipeline import PipelineOptions
from tf_dist.errors import UsageError
from tf_dist.optim.async_lr import AsyncLearningRate
from tf_dist.parallel import buckets, transport_tuning
from tf_dist.parallel.mesh import Mesh, leaves_of
from tf_dist.parallel.reduction_tree import BlockSum, one_each, order
from tf_dist.pipeline.runner import PipelineReplica, PipelineRunner
from tf_dist.runners.context_parallel_runner import make_runner
from tf_dist.runners.replica import FlatParameters, Replica
from tf_dist.runners.runner import ModelRunner
from tf_dist.runners.sharded_norm import whole_norm
from tf_dist.strategies.base import Setting, Strategy
from tf_dist.training.onebit_adam import OneBitAdam, check_adam
from tf_dist.training.xla_autotune import talks_inside
from tf_dist.zero.sharded_replica import ShardedPipelineReplica, ShardedReplica
from tf_dist.zero.stage2 import ZeRO2Runner
from tf_dist.zero.stage3 import GatheredReplica, ZeRO3Runner

NO_XLA = "the layers of a pipeline's rank are compiled in steps"


class RunnerOptions(NamedTuple):
    """Options of runner and transport; field names are those of `tf_dist.config.Config`.

    measure: whether sums are timed, to choose the fastest transport.
    """

    allreduce: str = PerformanceOptions.allreduce
    chunk_bytes: int = PerformanceOptions.chunk_bytes
    measure: bool = True
    overlap: str = PerformanceOptions.overlap
    pipeline: PipelineOptions = PipelineOptions()


@dataclass
class StrategyContext:
    """`tf_dist.strategies.base.Context` of a rank."""

    mesh: Mesh
    replica: Replica | PipelineReplica
    optimizer: keras.optimizers.Optimizer
    micro_batches: range
    count: int
    measure: bool

    def learning_rate_setter(self) -> Callable[[int, float], None]:
        """As in `tf_dist.strategies.base.Context`."""
        return AsyncLearningRate(self.optimizer)

    def frozen_adam(self) -> Callable[[int], Any]:
        """As in `tf_dist.strategies.base.Context`."""
        check_adam(self.optimizer)
        return lambda steps: OneBitAdam(self.replica, steps)


class RankPlan(NamedTuple):
    """The objects with which a rank trains.

    micro_batches: indices of this rank's micro-batches of a step, in order. order: of the sums over
    `Mesh.replicas`. description: status line about the transport of sums. no_xla: why XLA cannot compile this
    rank's work; empty if it can.
    """

    replica: Replica | PipelineReplica
    runner: ModelRunner
    micro_batches: range
    order: ReductionOrder
    description: str
    no_xla: str = ""


def arrange(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    mesh: Mesh,
    rows: int,
    seq_len: int,
    seed: int,
    count: int,
    strategy: Strategy,
    runner_options: RunnerOptions,
) -> RankPlan:
    """Build a rank's plan; a collective.

    Args:
        model: with all layers.
        optimizer: not built yet, unless every rank holds all of its state.
        mesh: all ranks.
        rows: B, of a micro-batch.
        seq_len: T, of a whole row.
        seed: of dropout.
        count: micro-batches of a global batch.
        strategy: not set up yet.
        runner_options: of runner and transport.

    Raises:
        UsageError: on every rank: model, optimizer, mesh and strategy do not fit together.
    """
    _, pipeline, sequence, tensor = mesh.shape
    strategy.check(Setting(ParallelismOptions(tensor, pipeline, sequence).above_1))
    mine, sizes = strategy.assignment(count, mesh), (rows, seq_len // mesh.sequence.size, seed)
    sharding = strategy.traits.sharding
    replica = _replica(model, optimizer, mesh, sizes, sharding, runner_options.pipeline, len(mine))
    replica.norm = whole_norm(replica, model.trainable_variables, mesh)
    _check_optimizer(replica, mesh)
    strategy.setup(StrategyContext(mesh, replica, optimizer, mine, count, runner_options.measure))
    if not strategy.traits.lockstep:
        return _nothing_summed(replica, mesh, mine, count, strategy)
    if sharding > 1:
        return _summed_at_once(replica, mesh, mine, count, strategy)
    return _summing(replica, mesh, mine, count, strategy, runner_options)


def _replica(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    mesh: Mesh,
    sizes: tuple[int, int, int],
    sharding: int,
    pipeline: PipelineOptions,
    mine: int,
) -> Any:
    """The rank's part of the model and its optimizer."""
    if mesh.pipeline.size > 1:
        kind = ShardedPipelineReplica if sharding else PipelineReplica
        return kind(model, optimizer, mesh, *sizes, pipeline, mine)
    if sharding == 3:
        return GatheredReplica(model, optimizer, *sizes, mesh)
    if sharding:
        return ShardedReplica(model, optimizer, *sizes, mesh)
    return Replica(model, optimizer, *sizes)


def _summing(
    replica: Any,
    mesh: Mesh,
    mine: range,
    count: int,
    strategy: Strategy,
    runner_options: RunnerOptions,
) -> RankPlan:
    """Each rank sums the gradients of its own, contiguous micro-batches; then they are all-reduced."""
    leaves, blocks = leaves_of(count, mesh)
    terms, comm, traits = order(leaves, blocks), mesh.replicas, strategy.traits
    chosen = transport_tuning.TransportChoice(None, strategy.describe())
    if traits.sums_gradients:
        chosen = transport_tuning.choose(
            comm,
            replica.parameters,
            terms,
            runner_options.allreduce,
            runner_options.chunk_bytes,
            runner_options.measure,
        )
        chosen = chosen._replace(said="; ".join(filter(None, [chosen.said, strategy.describe()])))
    if mesh.pipeline.size > 1:
        pipelined = PipelineRunner(replica, leaves, blocks[comm.rank], chosen.buffers)
        return RankPlan(replica, pipelined, mine, terms, chosen.said, NO_XLA)
    sums = BlockSum(replica.parameters, leaves, blocks[comm.rank], chosen.buffers)
    why_not = "" if traits.overlaps else f"strategy {strategy} needs all of them at once"
    if comm.survives:
        why_not = "a rank may fail meanwhile"
    overlap = buckets.choose(comm, replica.layout, terms, sums, runner_options.overlap, why_not)
    runner = make_runner(replica, mine, sums, overlap, mesh)
    return RankPlan(replica, runner, mine, terms, chosen.said, talks_inside(replica.model))


def _nothing_summed(replica: Any, mesh: Mesh, mine: range, count: int, strategy: Strategy) -> RankPlan:
    """Gradients are not all-reduced."""
    sums = BlockSum(replica.parameters, mine or range(count), mine)
    runner = make_runner(replica, mine, sums, buckets.BucketOverlap(None, ""), mesh)
    no_xla = talks_inside(replica.model)
    return RankPlan(replica, runner, mine, one_each(mesh.all.size), strategy.describe(), no_xla)


def _summed_at_once(replica: Any, mesh: Mesh, mine: range, count: int, strategy: Strategy) -> RankPlan:
    """Gradients are reduce-scattered as they are computed."""
    runner: ModelRunner
    if strategy.traits.sharding == 3:
        runner = ZeRO3Runner(replica, count, mesh.reports_loss)
        no_xla = "weights are gathered and freed during a step"
    else:
        runner = ZeRO2Runner(replica, count, mesh.replicas, mesh.reports_loss)
        no_xla = "gradients are reduced during the backward pass"
    leaves, blocks = leaves_of(count, mesh)
    return RankPlan(replica, runner, mine, order(leaves, blocks), strategy.describe(), no_xla)


def rebuilt(old: RankPlan, mesh: Mesh, count: int, strategy: Strategy) -> RankPlan:
    """A rank's plan after others have failed; a collective of the survivors.

    Args:
        old: the plan so far.
        mesh: the surviving ranks.
        count: micro-batches of a global batch.
        strategy: as before.
    """
    mine = strategy.assignment(count, mesh)
    if not strategy.traits.lockstep:
        return _nothing_summed(old.replica, mesh, mine, count, strategy)
    # As in `_summing`, with the same transport and the functions that are compiled already.
    replica, comm = old.replica, mesh.replicas
    assert isinstance(replica, Replica)  # all ranks have everything (`InPlaceRecovery.can`)
    leaves, blocks = leaves_of(count, mesh)
    terms = order(leaves, blocks)
    buffers = comm.term_buffers(replica.parameters, terms) if comm.carried_by == WINDOW else None
    sums = BlockSum(replica.parameters, leaves, blocks[comm.rank], buffers)
    runner = make_runner(replica, mine, sums, buckets.BucketOverlap(None, ""), mesh)
    return old._replace(runner=runner, micro_batches=mine, order=terms)


def _check_optimizer(replica: FlatParameters, mesh: Mesh) -> None:
    """Refuse an optimizer that needs whole variables, or all of them, if no rank holds them."""
    reason = replica.optimizer_step.reason
    if reason and not mesh.plain:
        raise UsageError(
            f"{mesh}: a weight's step must depend on nothing but its own gradient and state, and {reason}. "
            "Use adamw, adam, sgd, lion or another elementwise optimizer of Keras, without options that "
            "look at whole variables"
        )
