"""`CheckpointManager`: checkpoints that all ranks write while training continues.

At a save ranks stop for as long as it takes to copy what they will write, each its part of the tensors. A
thread on each rank writes and syncs its shard; that of rank 0 then waits for the records of all ranks and
commits the checkpoint. No thread uses MPI: ranks synchronize at the next save, or at the end, and learn the
outcome of the last one. After a death an unfinished checkpoint is given up; the next save is a new one.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tf_dist.checkpoint import shards, store
from tf_dist.checkpoint.async_writer import AsyncWriter, SavedCheckpoint, WritePlan
from tf_dist.comm.runtime.consensus import on_root
from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.runtime.memory_limits import has_room
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import CheckpointError
from tf_dist.training.checkpoint_reader import CheckpointReader
from tf_dist.training.snapshot import Snapshot

LOG = logging.getLogger(__name__)
# A longer wait for the disk is reported.
LONG_S = 1.0
# Copies are made if this many times their size is free: what training allocates next is not known.
SPARE = 2


class CheckpointManager(CheckpointReader):
    """The slowest `SnapshotStore`: writes the checkpoints of a training, and reads them.

    Args:
        comm: all ranks.
        folder: holds the checkpoints.
        keep: newest ones kept.
        background: write while training continues; otherwise a save returns when it is on disk.
        may_write: called on rank 0 before anything is written; raises if that is not allowed.
    """

    def __init__(
        self,
        comm: Comm,
        folder: Path,
        keep: int,
        background: bool = True,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(folder)
        self._comm, self._keep = comm, keep
        self._background, self._may_write = background, may_write
        self._log = once(LOG, comm)
        self._flight: AsyncWriter | None = None
        self._room = np.empty(0, np.uint8)  # for what is being written; the same from save to save
        self._writers: tuple[int, list[int]] = (0, [])  # for a number of ranks
        self._news: SavedCheckpoint | None = None
        self._said_full = False

    def begin(self, snapshot: Snapshot, keep: int | None = None) -> None:
        """Copy a snapshot, and write it in the background; a collective, which may be repeated after a death.

        Args:
            snapshot: of now.
            keep: newest checkpoints kept from then on; None: as constructed.

        Raises:
            CheckpointError: the last one could not be written, or no folder can be made for this one.
        """
        self.settle()
        comm, whole = self._comm, snapshot.shards
        # A manifest has the step beside the facts, and metrics.jsonl the last row.
        facts = {key: value for key, value in snapshot.state.items() if key not in ("step", "last_row")}
        writers, final = self._who_writes(), store.path_of(self.folder, snapshot.step)
        temporary = Path(on_root(comm, lambda: _begun(final)))
        plan = WritePlan(temporary, final, facts, writers, self._keep if keep is None else keep)
        sizes = [entry.size_bytes for entry in whole.entries]
        writer_of = shards.assign(sizes, writers)
        mine = whole.shard(writer_of)
        specs = [
            shards.TensorSpec(number, entry.name, entry.shape, entry.dtype)
            for number, entry in enumerate(whole.entries)
            if writer_of[number] == comm.rank
        ]
        flight = AsyncWriter(plan, comm.rank, self._may_write, specs)
        # A rank that writes for others would need memory for all that they hold.
        near = len(writers) == comm.size or whole.mesh.plain
        size = shards.bytes_of(sizes, writer_of, comm.rank)
        if self._background and near and self._all_have_room(size):
            copies = self._copied(mine, size)
            comm.barrier()
            flight.start(copies)
        else:
            flight.write(mine)
            comm.barrier()
            flight.start(None)
        self._flight = flight

    def settle(self) -> SavedCheckpoint | None:
        """Wait until the last checkpoint is on disk; a collective, which may be repeated after a death.

        Returns:
            The checkpoint; None if there was none, or it was given up.

        Raises:
            CheckpointError: on every rank, if any could not write.
        """
        comm, flight, begun = self._comm, self._flight, time.perf_counter()
        mine = None if flight is None else flight.written()
        failed = next((error for error in comm.allgather_obj(mine) if error), None)
        if flight is not None and failed:
            flight.give_up()
        outcome = None if flight is None else flight.ended()
        # Not a broadcast: no rank may leave before all have come.
        made: SavedCheckpoint | None
        made, error = comm.allgather_obj([outcome, flight.error if flight is not None else None])[0]
        self._flight = None
        waited = time.perf_counter() - begun
        if comm.rank == 0 and flight is not None:
            flight.remove_incomplete()
            self._news = flight.told()
            if outcome is None and not (failed or error):
                self._log.warning(f"the checkpoint of step {flight.step} was not finished when a rank died")
            elif self._background and waited > LONG_S:
                self._log.info(
                    f"waited {waited:.1f} s for the checkpoint of step {flight.step} to be written"
                )
        if failed or error:
            raise CheckpointError(failed or error)
        return made

    def save(self, snapshot: Snapshot, keep: int | None = None) -> SavedCheckpoint | None:
        """`begin`, and wait until the checkpoint is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        self.begin(snapshot, keep)
        return self.settle()

    def news(self) -> SavedCheckpoint | None:
        """The checkpoint that has been finished since the last call, if any; on rank 0.

        Raises:
            CheckpointError: it could not be written; on the rank that could not.
        """
        flight = self._flight
        if flight is not None and flight.over:
            if flight.error:
                raise CheckpointError(flight.error)
            return flight.told()
        news, self._news = self._news, None
        return news

    def give_up(self) -> None:
        """Do not wait for shards of ranks that have died."""
        if self._flight is not None:
            self._flight.give_up()

    def abandon(self) -> None:
        """Give up, and return when this rank writes no more: training restarts on other ranks."""
        self.give_up()
        if self._flight is not None:
            self._flight.ended()

    def _all_have_room(self, size: int) -> bool:
        """Whether every rank can keep a copy of this many bytes of its own; a collective."""
        comm = self._comm
        mine = size <= self._room.size or has_room(SPARE * size, comm.size)
        fits = all(comm.allgather_obj(mine))
        if not fits and not self._said_full:
            self._said_full = True
            self._log.warning("no memory for a copy of a checkpoint: training waits while it is written")
        return fits

    def _copied(self, tensors: Iterator[shards.Numbered], size: int) -> list[shards.Numbered]:
        """Copies of tensors, in memory that the next save will reuse."""
        if self._room.size < size:
            self._room = np.empty(size, np.uint8)
        copies, offset = [], 0
        for number, name, tensor in tensors:
            copy = np.ndarray(tensor.shape, tensor.dtype, self._room.data, offset)
            np.copyto(copy, tensor)
            copies.append((number, name, copy))
            offset += tensor.nbytes
        return copies

    def _who_writes(self) -> Sequence[int]:
        """The ranks that see the folder of rank 0; a collective, once for each number of ranks."""
        comm = self._comm
        if self._writers[0] != comm.size:
            name = Path(on_root(comm, self._probe))
            seen = comm.allgather_obj(name.exists())
            if comm.rank == 0:
                name.unlink(missing_ok=True)
            writers = [rank for rank, sees in enumerate(seen) if sees or rank == 0]
            self._writers = (comm.size, writers)
            if len(writers) < comm.size:
                self._log.info(
                    f"{len(writers)} of {comm.size} ranks see {self.folder}, and write all checkpoints"
                )
        return self._writers[1]

    def _probe(self) -> str:
        path = self.folder / f".probe-{secrets.token_hex(8)}"
        with shards.explain_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        return str(path)


def _begun(final: Path) -> str:
    with shards.explain_disk_errors(final):
        return str(shards.begin(final))
