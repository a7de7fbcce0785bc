"""What a strategy remembers from step to step, as a checkpoint and the sentinel see it.

What it remembers may be each rank's own: weights and moments between meetings, gradients that were not sent
yet. A checkpoint knows no ranks. So before one is written, ranks put together what they have
(`Strategy.consolidate`), and go on from there: a run that is resumed and one that was never stopped are the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.errors import RankLost
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.parts import Part, part_of
from tf_dist.strategies.base import StateArray, Strategy
from tf_dist.training.pieces import Piece, array_piece
from tf_dist.training.replica import Weights
from tf_dist.training.whole import Entry

# How its tensors are called in a checkpoint.
REMEMBERED = "remembered/"


class Held:
    """An array, as the sentinel looks at a variable."""

    def __init__(self, array: np.ndarray) -> None:
        self.value, self.shape, self.dtype = array, array.shape, str(array.dtype)

    def assign(self, array: np.ndarray) -> None:
        """Take over its values."""
        np.copyto(self.value, array)


def held_by_all(strategy: Strategy, state: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What all replicas have alike beside their weights, whenever these are equal.

    Args:
        strategy: of all ranks.
        state: of the optimizer, by name.
    """
    if strategy.traits.optimizer_on_root:
        return []
    if not strategy.traits.replicas_equal:  # moments are each replica's own; single numbers are not
        state = [(path, variable) for path, variable in state if not variable.shape]
    return state + [(one.name, Held(one.array)) for one in strategy.state() if one.alike]


def survived(comm: Comm, meet: Callable[[], None], go_on: Callable[[list[int]], None]) -> None:
    """Let all meet, in spite of deaths before and meanwhile; a collective.

    Args:
        comm: all ranks.
        meet: collectives, which may be begun again.
        go_on: is told who has died, and prepares for meeting without them.
    """
    while True:
        lost = comm.regroup()  # nobody begins before all are here, or known to be dead
        if lost is None:
            lost = comm.regroup(_done(meet))
        if lost is None:
            return
        go_on(lost)


def _done(meet: Callable[[], None]) -> bool:
    """Whether nobody has died meanwhile, as far as this rank knows."""
    try:
        meet()
    except RankLost:
        return False
    return True


def remembered(strategy: Strategy, model: keras.Model, replica: Weights, mesh: Mesh) -> list[Entry]:
    """The tensors of a checkpoint that only this strategy knows."""
    entries = []
    for one in strategy.state():
        if one.per_weight:
            entries += _like_weights(one, model, replica, one.alike or mesh.all.rank == 0)
        else:
            part = Part(one.array.shape)
            pieces = [array_piece(one.array, part)]
            entries.append(Entry(f"{REMEMBERED}{one.name}", part.whole, "float32", pieces))
    return entries


def _like_weights(one: StateArray, model: keras.Model, replica: Weights, has: bool) -> list[Entry]:
    """For each weight what a flat array has of it, where this rank has that."""
    place = {id(variable): i for i, variable in enumerate(replica.variables)}
    entries = []
    for number, variable in enumerate(model.trainable_variables):
        part, pieces = part_of(variable), list[Piece]()
        if has and id(variable) in place:
            here = place[id(variable)]
            own = one.array[replica.layout.starts[here] : replica.layout.starts[here + 1]]
            pieces = [array_piece(own, part)]
        path = f"{REMEMBERED}{one.name}/{number:04d}/{variable.path}"
        entries.append(Entry(path, part.whole, "float32", pieces))
    return entries
