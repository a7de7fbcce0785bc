"""Synchronous parameter server: only rank 0 steps, and broadcasts the weights."""

from __future__ import annotations

import numpy as np

from tf_dist import faults
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.totals import TOKENS, scale_of, sum_buffer
from tf_dist.strategies.base import StepRequest, Strategy, Traits


class ParameterServer(Strategy):
    """Reduce the gradients to rank 0 of the replicas, which alone steps, and broadcasts the weights.

    The parameter server of Li et al. (2014), in its synchronous form. Rank 0 holds R gradients and moves R
    times the bytes of any other: see ``docs/guide.md`` for what that costs. If the norm is not finite
    no rank has stepped.
    """

    name = "master"
    traits = Traits(optimizer_on_root=True, atomic_step=True)

    def step(self, request: StepRequest) -> float:
        """As in `Strategy`."""
        terms, replica, mesh = request.gradients(), request.replica, request.mesh
        mesh.all.barrier()
        counts = request.totals.reduce(mesh.all)
        faults.at("allreduce")
        total = mesh.replicas.reduce_terms(terms, request.order, sum_buffer(terms, replica))
        length = np.zeros(1)
        if total is not None:
            gradient = replica.complete(total.array)
            length[0] = replica.norm(gradient, total.squares) / max(counts[TOKENS], 1.0)
        mesh.all.broadcast(length)
        faults.at("update")
        if not np.isfinite(length[0]):
            return float(length[0])
        scale = scale_of(float(length[0]), counts, request.clip_norm)
        weights = aligned_empty(replica.parameters)
        if total is not None:
            replica.apply(gradient, scale)
            replica.read_weights(weights)
        else:
            replica.skip()
        mesh.replicas.broadcast(weights)
        if mesh.replicas.rank != 0:
            replica.write_weights(weights)
        return float(length[0])
