"""Updates that remember something from step to step, as a checkpoint and the sentinel see them.

What an update remembers may be each rank's own: weights and moments between meetings, gradients that were not
sent yet. A checkpoint knows no ranks. So before one is written, ranks put together what they have, and go on
from there: a run that is resumed and one that was never stopped are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.errors import RankLost
from tf_dist.parallel.compressed import Compressed
from tf_dist.parallel.elastic import Elastic
from tf_dist.parallel.gossip import Gossip
from tf_dist.parallel.local import LocalSteps
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.parts import Part, part_of
from tf_dist.parallel.tree import one_each
from tf_dist.training.downpour import Downpour
from tf_dist.training.pieces import Piece, array_piece
from tf_dist.training.replica import Weights
from tf_dist.training.whole import Entry

# How its tensors are called in a checkpoint.
REMEMBERED = "remembered/"

# Updates of which each rank knows its own losses alone until all meet.
Alone = Elastic | Gossip
# Of which no rank waits for all others until then.
Asynchronous = Downpour | Alone
Remembering = LocalSteps | Compressed | Asynchronous


class Held:
    """An array, as the sentinel looks at a variable."""

    def __init__(self, array: np.ndarray) -> None:
        self.value, self.shape, self.dtype = array, array.shape, str(array.dtype)

    def assign(self, array: np.ndarray) -> None:
        """Take over its values."""
        np.copyto(self.value, array)


def held_by_all(update: Remembering, state: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What all replicas have alike beside their weights, whenever these are equal.

    Args:
        update: remembers something.
        state: of the optimizer, by name.
    """
    if isinstance(update, Downpour):
        return []  # the master alone has an optimizer
    if isinstance(update, Compressed):
        common = update.compressor.common_arrays()
    else:  # moments are each replica's own; single numbers are not
        state = [(path, variable) for path, variable in state if not variable.shape]
        momentum = update.momentum if isinstance(update, LocalSteps) else np.empty(0)
        common = {"outer momentum": momentum} if momentum.size else {}
    return state + [(name, Held(array)) for name, array in common.items()]


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


def put_together(update: Remembering, optimizer: Any, replica: Weights, count: int, mesh: Mesh) -> None:
    """Leave nothing that a checkpoint cannot keep, after all have met; a collective.

    Args:
        update: remembers something.
        optimizer: of this rank.
        replica: this rank's.
        count: micro-batches of a step, of all replicas.
        mesh: all ranks.
    """
    if isinstance(update, Compressed):
        update.fold(mesh.all)
        return
    if isinstance(update, Downpour):
        # The master has taken several steps for each batch; schedules of whoever goes on count batches.
        optimizer.iterations.assign(update.step)
        return
    if not update.state_together:
        _average(optimizer, len(update.micro_batches) / count, mesh)
        update.state_together = True


def _average(optimizer: Any, share: float, mesh: Mesh) -> None:
    """Give all replicas the mean of their optimizers' state, weighed by their shares of the work.

    Single numbers, such as the count of steps, are equal already.
    """
    order = one_each(mesh.replicas.size)
    for variable in optimizer.variables:
        if variable.shape and "float" in str(variable.dtype):
            term = np.asarray(variable.value, np.float32).reshape(-1) * np.float32(share)
            total = mesh.replicas.allreduce_terms([term], order, term).array
            variable.assign(total.reshape(variable.shape).astype(variable.dtype))


def remembered(update: Remembering, model: keras.Model, replica: Weights, mesh: Mesh) -> list[Entry]:
    """The tensors of a checkpoint that only this update knows."""
    if isinstance(update, Downpour | Elastic | Gossip):
        return []
    if isinstance(update, LocalSteps):
        momentum = update.momentum
        return _like_weights("momentum", momentum, model, replica, True) if momentum.size else []
    entries = []
    for name, array in update.compressor.own_arrays().items():
        # What all have not sent is with rank 0 when it is saved.
        entries += _like_weights(name, array, model, replica, mesh.all.rank == 0)
    for name, array in update.compressor.common_arrays().items():
        part = Part(array.shape)
        entries.append(Entry(f"{REMEMBERED}{name}", part.whole, "float32", [array_piece(array, part)]))
    return entries


def _like_weights(
    name: str, array: np.ndarray, model: keras.Model, replica: Weights, has: bool
) -> list[Entry]:
    """For each weight what a flat array has of it."""
    place = {id(variable): i for i, variable in enumerate(replica.variables)}
    entries = []
    for number, variable in enumerate(model.trainable_variables):
        part, pieces = part_of(variable), list[Piece]()
        if has and id(variable) in place:
            here = place[id(variable)]
            own = array[replica.layout.starts[here] : replica.layout.starts[here + 1]]
            pieces = [array_piece(own, part)]
        path = f"{REMEMBERED}{name}/{number:04d}/{variable.path}"
        entries.append(Entry(path, part.whole, "float32", pieces))
    return entries
