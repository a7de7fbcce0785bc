"""Variables that are replicated on several ranks, grouped for the consistency check."""

from __future__ import annotations

import keras

from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.sharding import part_of
from tf_dist.runners.replica import FlatParameters
from tf_dist.strategies.base import Strategy
from tf_dist.training.consistency_check import ReplicaGroup
from tf_dist.training.strategy_state import held_by_all


def replicated_groups(
    model: keras.Model, replica: FlatParameters, mesh: Mesh, strategy: Strategy
) -> list[ReplicaGroup]:
    """The groups of variables that must be equal on all their ranks; as many groups on every rank."""
    weights = [(v.path, v) for v in model.weights if replica.holds(v)]
    state = [(v.path, v) for v in replica.optimizer_step.shared_variables()]
    state = held_by_all(strategy, state)
    groups = [ReplicaGroup(mesh.replicas, weights + state)]
    if mesh.tensor.size > 1:
        undivided = [(path, v) for path, v in weights if part_of(v).ranges is None]
        groups.append(ReplicaGroup(mesh.tensor, undivided))
    for variable in replica.tied:
        named = [(variable.path, variable)]
        groups.append(ReplicaGroup(mesh.pipeline, named, held=replica.holds(variable)))
    return groups
