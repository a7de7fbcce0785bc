"""ZeRO: what data-parallel ranks all have alike is divided among them (Rajbhandari et al. 2020).

The flat array of P parameters is cut into one shard for each of R ranks. In stage 1 each rank keeps the
optimizer's state of its shard alone; in stage 2 also the summed gradient; in stage 3 also the weights. Bytes
of a rank for each float32 parameter, with Adam's two moments and beside activations:

    allreduce   16            weights 4, gradient 4, moments 8
    stage 1     8 + 8 / R     reduce-scatter of the gradient, step of the shard, allgather of the weights
    stage 2     4 + 12 / R    gradients leave for their owners while the backward pass makes them
    stage 3     16 / R        weights come when a layer needs them, and go again

Shards are cut at whole blocks of squares, so that the global norm is made of the very sums that a rank alone
would have made; gradients are added in the order of the tree, and an elementwise optimizer changes each
weight by itself. So no bit depends on how many ranks share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from tf_dist import faults
from tf_dist.comm.base import WINDOW
from tf_dist.comm.sums import Order
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.updates import TOKENS, Totals, scale_of


class Sharded(Protocol):
    """What a rank has of the model, of whose flat array of P parameters it steps a shard."""

    parameters: int
    shards: Sequence[slice]

    def norm(self, gradient: np.ndarray, squares: np.ndarray | None = None) -> float:
        """The norm of the whole gradient from this rank's shard of it; a collective of all ranks."""

    def complete(self, gradient: np.ndarray) -> np.ndarray:
        """As of `tf_dist.parallel.updates.Replica`."""

    def apply(self, gradient: np.ndarray, scale: float) -> None:
        """Take one optimizer step of this rank's shard."""

    def read_shard(self, out: np.ndarray) -> None:
        """Copy this rank's shard of the weights to ``out``."""

    def write_others(self, weights: np.ndarray) -> None:
        """Take over the shards of the other ranks from all weights, (P,)."""

    def spread(self) -> None:
        """Give every rank the weights that it is to have, from those who step them; a collective."""


def zero_1(
    terms: list[np.ndarray], order: Order, totals: Totals, clip_norm: float, replica: Sharded, mesh: Mesh
) -> float:
    """Stage 1: each rank sums and steps its shard; all gather the new weights.

    Arguments and result are those of `tf_dist.parallel.updates.allreduce`. By messages a rank sends
    as many bytes. With a shared window on each of several nodes, or with other axes than data, it sends more:
    the sum is a whole allreduce there, and the allgather of the weights comes on top.
    """
    mesh.all.barrier()
    counts = totals.reduce(mesh.all)
    faults.at("allreduce")
    comm, shards = mesh.replicas, replica.shards
    mine = shards[comm.rank]
    whole = terms[0] if terms else aligned_empty(replica.parameters)
    if comm.carried_by == WINDOW or mesh.model.size > 1:
        # In a window nothing is sent, and the sum lies where all can see it.
        whole = replica.complete(comm.allreduce_terms(terms, order, whole).array)
    else:
        comm.reduce_scatter_terms(terms, order, shards, whole[mine])
    length = _agreed(replica, whole[mine], counts, mesh)
    faults.at("update")
    if not np.isfinite(length):
        return length
    replica.apply(whole[mine], scale_of(length, counts, clip_norm))
    if comm.size > 1:
        replica.read_shard(whole[mine])
        comm.allgather(whole, shards)
        replica.write_others(whole)
    return length


def zero_2_and_3(
    terms: list[np.ndarray], order: Order, totals: Totals, clip_norm: float, replica: Sharded, mesh: Mesh
) -> float:
    """Stages 2 and 3: each rank has its shard of the sum already, and steps it.

    Args:
        terms: this rank's shard of the summed gradient, alone.
        order: not used; the sum was made in its order.
        totals: of this rank; summed over ranks in place.
        clip_norm: largest global norm of the mean gradient; 0 for no clipping.
        replica: what this rank has of model and optimizer.
        mesh: all ranks.

    Returns:
        The global norm of the mean gradient before clipping. Where it is not finite, nobody has stepped.
    """
    mesh.all.barrier()
    counts = totals.reduce(mesh.all)
    faults.at("allreduce")
    length = _agreed(replica, terms[0], counts, mesh)
    faults.at("update")
    if np.isfinite(length):
        replica.apply(terms[0], scale_of(length, counts, clip_norm))
        replica.spread()
    return length


STAGES = {1: zero_1, 2: zero_2_and_3, 3: zero_2_and_3}


def _agreed(replica: Sharded, shard: np.ndarray, counts: np.ndarray, mesh: Mesh) -> float:
    """The norm of the mean gradient; rank 0's, for it could differ on a node with another processor."""
    length = np.array([replica.norm(shard) / max(counts[TOKENS], 1.0)])
    mesh.all.broadcast(length)
    return float(length[0])
