"""What several ranks of a trainer hold alike, for the sentinel to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tf_dist.parallel.parts import part_of
from tf_dist.training.sentinel import Group
from tf_dist.training.strategy_state import held_by_all

if TYPE_CHECKING:
    from tf_dist.training.trainer import Trainer


def held_by_several(trainer: Trainer) -> list[Group]:
    """What must be the same on which ranks; as many groups on every rank."""
    replica, mesh = trainer.replica, trainer.mesh
    weights = [(v.path, v) for v in trainer.model.weights if replica.holds(v)]
    state = [(v.path, v) for v in replica.optimizer_step.shared_variables()]
    state = held_by_all(trainer.strategy, state)
    groups = [Group(mesh.replicas, weights + state)]
    if mesh.tensor.size > 1:
        undivided = [(path, v) for path, v in weights if part_of(v).ranges is None]
        groups.append(Group(mesh.tensor, undivided))
    for variable in replica.tied:
        named = [(variable.path, variable)]
        groups.append(Group(mesh.pipeline, named, held=replica.holds(variable)))
    return groups
