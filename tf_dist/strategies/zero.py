"""ZeRO: state that data-parallel ranks replicate is sharded among them (Rajbhandari et al. 2020).

The flat array of P parameters is split into one shard for each of R ranks. In stage 1 each rank holds only
the optimizer state of its shard; in stage 2 also the summed gradient; in stage 3 also the weights. Bytes per
rank and float32 parameter, with Adam's two moments and besides activations:

    allreduce   16            weights 4, gradient 4, moments 8
    stage 1     8 + 8 / R     reduce-scatter of the gradient, step of the shard, all-gather of the weights
    stage 2     4 + 12 / R    gradients are reduce-scattered during the backward pass
    stage 3     16 / R        weights are gathered when a layer needs them, and freed after it

Shards are split at full blocks of squares, so that the global norm consists of the same sums as on one rank;
gradients are added in tree order, and an elementwise optimizer updates each weight independently. So no bit
depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from tf_dist import faults
from tf_dist.comm.transport.base import WINDOW
from tf_dist.comm.transport.reduction_order import ReductionOrder
from tf_dist.errors import UsageError
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.mesh import DATA, Mesh
from tf_dist.parallel.reduce_scatter import dealt
from tf_dist.parallel.totals import TOKENS, scale_of
from tf_dist.strategies.base import Setting, StepRequest, Strategy, Traits, option


class ShardedModel(Protocol):
    """A rank's view of a model, of whose flat array of P parameters it updates a shard."""

    parameters: int
    shards: Sequence[slice]

    def norm(self, gradient: np.ndarray, squares: np.ndarray | None = None) -> float:
        """The global norm of the gradient from this rank's shard of it; a collective of all ranks."""

    def complete(self, gradient: np.ndarray) -> np.ndarray:
        """As in `tf_dist.parallel.totals.GradientReplica`."""

    def apply(self, gradient: np.ndarray, scale: float) -> None:
        """Take one optimizer step of this rank's shard."""

    def read_shard(self, out: np.ndarray) -> None:
        """Copy this rank's shard of the weights to ``out``."""

    def write_others(self, weights: np.ndarray) -> None:
        """Set the shards of the other ranks from all weights, (P,)."""

    def spread(self) -> None:
        """All-gather the weights that every rank needs from their owners; a collective."""


@dataclass(frozen=True)
class ZeroOptions:
    """What is sharded among the data-parallel ranks.

    Attributes:
        stage: 1 optimizer state, 2 also gradients, 3 also weights.
    """

    stage: int = option(
        1,
        text="what --strategy zero shards over data-parallel ranks: 1 optimizer state, 2 also gradients, "
        "3 also weights",
        least=1,
        most=3,
        flag="zero_stage",
        may_be_idle=True,  # compatibility with runs of older versions
        on_resume="free",
    )


class Zero(Strategy):
    """ZeRO in its three stages; see the module docstring. No rank steps if the norm is not finite."""

    name, Options = "zero", ZeroOptions

    def __init__(self, options: ZeroOptions | None = None, **given: Any) -> None:
        super().__init__(options, **given)
        self.stage: int = self.options.stage
        self.traits = Traits(sharding=self.stage, sums_gradients=self.stage == 1, atomic_step=True)

    def check(self, setting: Setting) -> None:
        """As in `Strategy`."""
        if self.stage > 1 and setting.shared:
            raise UsageError(
                f"zero_stage {self.stage} with {setting.degrees}: gradients and weights are divided among "
                "data ranks alone, so it needs all ranks along the data axis. Use zero_stage 1, which "
                "divides the optimizer's state, or degrees of 1"
            )
        if setting.backend == "horovod":  # HorovodComm has no reduce-scatter
            shared = f"{setting.degrees} and " if setting.shared else ""
            raise UsageError(f"backend horovod cannot carry {shared}strategy zero: use backend mpi")

    def assignment(self, count: int, mesh: Mesh) -> range:
        """Round-robin from stage 2 on, where all ranks reduce each micro-batch's gradient at once."""
        if self.stage == 1:
            return super().assignment(count, mesh)
        return dealt(count, mesh.at[DATA], mesh.shape[DATA])

    def describe(self) -> str:
        """As in `Strategy`."""
        return "by their owners, as they are made" if self.stage > 1 else ""

    def step(self, request: StepRequest) -> float:
        """As in `Strategy`.

        Stage 1: each rank reduces and updates its shard; all gather the new weights. By messages a rank sends
        as many bytes as with an all-reduce. With a shared window on each of several nodes, or with other axes
        than data, it sends more: the sum is a full all-reduce there, plus the all-gather of the weights.
        Stages 2 and 3: each rank has its shard of the sum already, and updates it.
        """
        terms, replica, mesh = request.gradients(), cast(ShardedModel, request.replica), request.mesh
        mesh.all.barrier()
        counts = request.totals.reduce(mesh.all)
        faults.at("allreduce")
        if self.stage == 1:
            whole = _summed(terms, request.order, replica, mesh)
            shard = whole[replica.shards[mesh.replicas.rank]]
        else:
            shard = terms[0]
        length = _agreed(replica, shard, counts, mesh)
        faults.at("update")
        if not np.isfinite(length):
            return length
        replica.apply(shard, scale_of(length, counts, request.clip_norm))
        if self.stage > 1:
            replica.spread()
        elif mesh.replicas.size > 1:
            replica.read_shard(shard)
            mesh.replicas.allgather(whole, replica.shards)
            replica.write_others(whole)
        return length


def _summed(terms: list[np.ndarray], order: ReductionOrder, replica: ShardedModel, mesh: Mesh) -> np.ndarray:
    """An array, (P,), in which this rank's shard is that of the sum."""
    comm, shards = mesh.replicas, replica.shards
    whole = terms[0] if terms else aligned_empty(replica.parameters)
    if comm.carried_by == WINDOW or mesh.model.size > 1:
        # In a window nothing is sent, and every rank can read the sum.
        return replica.complete(comm.allreduce_terms(terms, order, whole).array)
    comm.reduce_scatter_terms(terms, order, shards, whole[shards[comm.rank]])
    return whole


def _agreed(replica: ShardedModel, shard: np.ndarray, counts: np.ndarray, mesh: Mesh) -> float:
    """The norm of the mean gradient; rank 0's, as it could differ on a node with another processor."""
    length = np.array([replica.norm(shard) / max(counts[TOKENS], 1.0)])
    mesh.all.broadcast(length)
    return float(length[0])
