"""Allreduce: all ranks sum the gradients, and each takes the same optimizer step."""

from __future__ import annotations

import numpy as np

from tf_dist import faults
from tf_dist.errors import RankLost
from tf_dist.parallel.totals import TOKENS, scale_of, sum_buffer
from tf_dist.strategies.base import StepRequest, Strategy, Traits


class AllReduce(Strategy):
    """Synchronous data-parallel gradient descent (Goyal et al. 2017), with the bits of one rank.

    If the norm is not finite, which all ranks find alike, no weight changes.
    """

    name = "allreduce"
    traits = Traits(atomic_step=True, survives_failures=True, overlaps=True)

    def step(self, request: StepRequest) -> float:
        """As in `Strategy`."""
        terms, replica, mesh = request.gradients(), request.replica, request.mesh
        mesh.all.barrier()  # waiting for slower ranks is timed separately from communication
        counts = request.totals.reduce(mesh.all)
        faults.at("allreduce")
        total = mesh.replicas.allreduce_terms(terms, request.order, sum_buffer(terms, replica))
        gradient = replica.complete(total.array)
        # Rank 0's norm for all: on a node with another processor it could differ in its last bit.
        own = replica.norm(gradient, total.squares) / max(counts[TOKENS], 1.0)
        length = np.array([own])
        mesh.all.broadcast(length)
        if mesh.all.survives and not np.isclose(length[0], own, rtol=1e-3, equal_nan=True):
            raise RankLost("a death has cut a broadcast short")
        faults.at("update")
        if np.isfinite(length[0]):
            replica.apply(gradient, scale_of(float(length[0]), counts, request.clip_norm))
        return float(length[0])
