"""`CheckpointReader`: snapshots on disk. Rank 0 reads, and all ranks receive their shards.

Nothing of the training changes before the whole checkpoint is read and verified: each rank first receives its
shards in memory of their own, at most one more copy of what it holds. If memory lacks that, the
checkpoint is verified first, in constant memory, and then read once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist import progress
from tf_dist.checkpoint import store
from tf_dist.checkpoint.checked_facts import check_position
from tf_dist.checkpoint.sharded_state import Entry, ShardedState, write
from tf_dist.comm.runtime.consensus import on_root
from tf_dist.comm.runtime.memory_limits import has_room
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import CheckpointError
from tf_dist.training.snapshot import Check, DamagedSnapshot, matching


class CheckpointReader:
    """The checkpoints in a folder, as a `SnapshotSource`; only rank 0 reads it.

    Args:
        folder: of the checkpoints; may be missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self, comm: Comm, before: int | None = None) -> int | None:
        """As in `SnapshotSource`, by the names of folders; a checkpoint may turn out to be damaged."""

        def found() -> int | None:
            steps = [store.step_of(path) for path in store.listing(self.folder)]
            return max((step for step in steps if before is None or step < before), default=None)

        step: int | None = on_root(comm, found)
        return step

    def restore(self, step: int, into: ShardedState, check: Check | None = None) -> dict[str, Any]:
        """As in `SnapshotSource`."""
        return restore_from(store.path_of(self.folder, step), into, check)

    def where(self, step: int) -> str:
        """As in `SnapshotSource`."""
        return str(store.path_of(self.folder, step))


def restore_from(path: Path, into: ShardedState, check: Check | None = None) -> dict[str, Any]:
    """Set all tensors to those of a checkpoint; a collective. Errors are those of `SnapshotSource.restore`.

    Args:
        path: of the checkpoint; matters on rank 0.
        into: receives the tensors.
        check: called on rank 0 with the path and the facts, before a tensor is read.

    Returns:
        The facts of the checkpoint, and its ``step``.
    """
    with progress.task("reading the checkpoint"):
        return _restored(_Reading(path), path, into, check)


def _restored(reading: _Reading, path: Path, into: ShardedState, check: Check | None) -> dict[str, Any]:
    comm = into.mesh.all
    state: dict[str, Any] = on_root(comm, lambda: reading.begin(into.entries, check))
    staged = all(comm.allgather_obj(has_room(into.held_bytes, comm.size)))
    if not staged and comm.rank == 0:
        reading.verify()
    if damage := str(comm.broadcast_obj(reading.damage)):
        raise DamagedSnapshot(path, damage)
    tensors = reading.tensors() if comm.rank == 0 else None
    received: list[tuple[Entry, list[np.ndarray]]] = []
    for entry in into.entries:
        shards = into.receive(entry, None if tensors is None else next(tensors))
        if staged:
            received.append((entry, shards))
        else:
            write(entry, shards)
    if damage := str(comm.broadcast_obj(reading.damage)):
        if not staged:
            raise CheckpointError(f"{damage}. It was valid a moment ago, and the weights are overwritten")
        raise DamagedSnapshot(path, damage)
    for entry, shards in received:
        write(entry, shards)
    return state


class _Reading:
    """A checkpoint being read by rank 0. damage: what was found so far, or nothing."""

    def __init__(self, path: Path) -> None:
        self._path, self.damage = path, ""
        self._wanted: list[tuple[Entry, int | None]] = []

    def begin(self, entries: list[Entry], check: Check | None) -> dict[str, Any]:
        """Read all but the tensors; the state, or nothing if that is damaged.

        Raises:
            CheckpointError: it is of another model, optimizer or run.
        """
        try:
            self._checkpoint = store.open_checkpoint(self._path)
        except CheckpointError as error:
            self.damage = str(error)
            return {}
        manifest = self._checkpoint.manifest
        if check is not None:
            check(self._path, manifest["facts"])
        check_position(manifest["facts"], self._path)
        # Before anything of foreign size is read.
        self._wanted = list(
            zip(entries, matching(manifest["tensors"], entries, str(self._path)), strict=True)
        )
        return {**manifest["facts"], "step": manifest["step"]}

    def verify(self) -> None:
        """Read all of it once, in constant memory."""
        try:
            if not self.damage:
                store.verify(self._path)
        except CheckpointError as error:
            self.damage = str(error)

    def tensors(self) -> Iterator[np.ndarray]:
        """Each wanted tensor; zeros for state that another strategy would have, and once damage is found.

        All ranks wait for each of them, so damage does not end it.
        """
        saved = store.read_tensors(self._checkpoint)
        for entry, number in self._wanted:
            array = np.zeros(entry.shape, entry.dtype)
            if number is not None and not self.damage:
                try:
                    array = next(saved)[1]
                except CheckpointError as error:
                    self.damage = str(error)
            yield array
