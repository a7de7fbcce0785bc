"""Replay: return to the last state in which all replicas were equal, and repeat the steps since then.

A bit that flips in one replica spoils more than this replica: every gradient computed with it has entered
sums that all ranks share. So if replicas are restored (`--on-mismatch restore`), all ranks return to the last
state in which the consistency check found no difference, and repeat the steps since then. A step is a
function of weights, optimizer and its number, so the weights are, bit for bit, those of a run in which
nothing happened.

The cost: a second copy of weights and optimizer, made at each check, and the repeated steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tf_dist.checkpoint.sharded_state import ShardedState, write
from tf_dist.comm.transport.base import Comm
from tf_dist.parallel.tensor_shard import TensorShard
from tf_dist.training.snapshot import Check, Snapshot
from tf_dist.training.train_state import TrainState


class OwnMemory:
    """The fastest `SnapshotStore`: one snapshot, a copy of this rank's shards in its own memory.

    It is of use while no rank dies: what a dead rank held is lost.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None
        self._copies: list[np.ndarray] = []  # of each shard, in order; the memory is used again

    @property
    def step(self) -> int | None:
        """Of the snapshot; None if there is none."""
        return None if self._state is None else int(self._state["step"])

    def save(self, snapshot: Snapshot) -> None:
        """Replace the snapshot."""
        pieces = _pieces(snapshot.shards)
        if len(self._copies) == len(pieces):
            for copy, piece in zip(self._copies, pieces, strict=True):
                np.copyto(copy, piece.read())
        else:
            self._copies = [np.array(piece.read()) for piece in pieces]
        self._state = snapshot.state

    def newest(self, comm: Comm, before: int | None = None) -> int | None:
        """As in `SnapshotSource`; all ranks save together, so nothing is exchanged."""
        return None if self.step is None or (before is not None and self.step >= before) else self.step

    def restore(self, step: int, into: ShardedState, check: Check | None = None) -> dict[str, Any]:
        """As in `SnapshotSource`."""
        assert self._state is not None and self.step == step
        copies = iter(self._copies)
        for entry in into.entries:
            write(entry, [next(copies) for _ in entry.pieces])
        return self._state

    def where(self, step: int) -> str:
        """As in `SnapshotSource`."""
        return "own memory"

    def drop(self) -> None:
        """Forget the snapshot."""
        self._state, self._copies = None, []


class Replay:
    """Keeps the last state in which all ranks were equal, and repeats steps from there.

    Args:
        state: of the training.
        whole: all tensors; a collective.
        take: takes the next step, on the data of the last one.
        can: whether replay is wanted and possible: ranks take each step together, with whole models.
    """

    def __init__(
        self, state: TrainState, whole: Callable[[], ShardedState], take: Callable[[], object], can: bool
    ) -> None:
        self._state, self._whole, self._take, self.can = state, whole, take, can
        self._verified = OwnMemory()
        self._until: int | None = None
        self._inside = False

    def keep(self, step: int) -> None:
        """All ranks were found equal after this many steps."""
        if self.can:
            self._verified.save(Snapshot(self._state.state_dict(), self._whole()))

    def drop(self) -> None:
        """Forget it: the weights are about to change for another reason than a step."""
        self._verified.drop()

    def take_again(self, step: int) -> str:
        """Return to the verified state, and repeat all steps up to ``step``; a collective.

        Returns:
            What was done, as the end of a sentence; empty if it is not possible.

        Raises:
            RankLost: a rank has died; `finish` repeats the steps without it.
        """
        first = self._verified.step
        if not self.can or first is None:
            return ""
        if self._inside:  # another mismatch, while steps are repeated
            self._repeat_until(step)
        else:
            self._until = step
            self.finish()
        steps = f"step {step} was" if first + 1 == step else f"steps {first + 1} to {step} were"
        return f", and {steps} taken again" if first < step else ""

    def finish(self) -> None:
        """Repeat steps whose repetition a death has interrupted; a collective."""
        if self._until is None or self._verified.step is None or self._inside:
            return
        self._inside = True
        try:
            self._repeat_until(self._until)
            self._until = None
        finally:
            self._inside = False

    def _repeat_until(self, until: int) -> None:
        assert self._verified.step is not None
        self._state.rewind(self._verified.restore(self._verified.step, self._whole()))
        while self._state.step < until:
            self._take()


def _pieces(shards: ShardedState) -> list[TensorShard]:
    return [piece for entry in shards.entries for piece in entry.pieces]
