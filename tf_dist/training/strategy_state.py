"""State of a strategy, as a checkpoint and the consistency check see it.

It may differ between ranks: weights and moments between synchronizations, residuals of compression. A
checkpoint does not depend on ranks. So before one is written, ranks consolidate their state
(`Strategy.consolidate`), and continue from there: a resumed run equals one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tf_dist.checkpoint.sharded_state import Entry
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import RankLost
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.sharding import ShardSpec, part_of
from tf_dist.parallel.tensor_shard import TensorShard, array_shard
from tf_dist.runners.replica import FlatParameters
from tf_dist.strategies.base import StateArray, Strategy

# Prefix of its tensors in a checkpoint.
REMEMBERED = "remembered/"


class StateView:
    """An array with the attributes of a variable that the consistency check reads."""

    def __init__(self, array: np.ndarray) -> None:
        self.value, self.shape, self.dtype = array, array.shape, str(array.dtype)

    def assign(self, array: np.ndarray) -> None:
        """Copy values into it."""
        np.copyto(self.value, array)


def held_by_all(strategy: Strategy, state: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """State, besides weights, that is equal on all replicas whenever their weights are.

    Args:
        strategy: of all ranks.
        state: variables of the optimizer, by name.
    """
    if strategy.traits.optimizer_on_root:
        return []
    if not strategy.traits.replicas_equal:  # moments differ between replicas, scalars do not
        state = [(path, variable) for path, variable in state if not variable.shape]
    return state + [(one.name, StateView(one.array)) for one in strategy.state() if one.alike]


def survived(comm: Comm, meet: Callable[[], None], go_on: Callable[[list[int]], None]) -> None:
    """Synchronize all living ranks, whoever has died before or dies meanwhile; a collective.

    Args:
        comm: all ranks.
        meet: collectives that synchronize; may be repeated.
        go_on: called with the ranks that have died, to prepare ``meet`` without them.
    """
    while True:
        lost = comm.regroup()  # no rank begins before all are here, or known to be dead
        if lost is None:
            lost = comm.regroup(_done(meet))
        if lost is None:
            return
        go_on(lost)


def _done(meet: Callable[[], None]) -> bool:
    """False if this rank has noticed a death meanwhile."""
    try:
        meet()
    except RankLost:
        return False
    return True


def remembered(strategy: Strategy, model: keras.Model, replica: FlatParameters, mesh: Mesh) -> list[Entry]:
    """The tensors of a checkpoint that are state of this strategy."""
    entries = []
    for one in strategy.state():
        if one.per_weight:
            entries += _like_weights(one, model, replica, one.alike or mesh.all.rank == 0)
        else:
            part = ShardSpec(one.array.shape)
            pieces = [array_shard(one.array, part)]
            entries.append(Entry(f"{REMEMBERED}{one.name}", part.whole, "float32", pieces))
    return entries


def _like_weights(one: StateArray, model: keras.Model, replica: FlatParameters, has: bool) -> list[Entry]:
    """A flat array as one tensor per weight; this rank's shards of them if it ``has`` any."""
    place = {id(variable): i for i, variable in enumerate(replica.variables)}
    entries = []
    for number, variable in enumerate(model.trainable_variables):
        part, pieces = part_of(variable), list[TensorShard]()
        if has and id(variable) in place:
            here = place[id(variable)]
            own = one.array[replica.layout.starts[here] : replica.layout.starts[here + 1]]
            pieces = [array_shard(own, part)]
        path = f"{REMEMBERED}{one.name}/{number:04d}/{variable.path}"
        entries.append(Entry(path, part.whole, "float32", pieces))
    return entries
