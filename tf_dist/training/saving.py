"""`Saver`: checkpoints that all ranks write, while training goes on.

At a save ranks stop for as long as it takes to copy what they will write, each its share of the tensors. A
thread on each rank writes and syncs its shard; that of rank 0 then waits for the records of all and makes a
checkpoint of them. No thread talks by MPI: ranks meet at the next save, or at the end, and hear what came of
the last one. After a death what is not finished is given up; the next save is a new one.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist.comm.agree import on_root
from tf_dist.comm.room import has_room
from tf_dist.errors import CheckpointError
from tf_dist.training import checkpoint, shards
from tf_dist.training.flight import Flight, Plan
from tf_dist.training.trainer import Trainer

# A wait for a disk that takes longer than this is worth a word.
LONG_S = 1.0
# Copies are made where this many times as much is free: what training takes next is not known.
SPARE = 2


def position(trainer: Trainer) -> dict[str, Any]:
    """Where a training is, beside its step, and what has been chosen by then that changes its bits."""
    tuned = {"xla": trainer.replica.xla}
    return {"tokens": trainer.tokens, "elapsed_s": trainer.elapsed_s, "tuned": tuned}


def _unsaid(line: str) -> None:
    """No-op callback."""


class Saver:
    """Writes the checkpoints of a training.

    Args:
        trainer: whose state is saved.
        folder: holds the checkpoints.
        keep: newest ones kept.
        background: write while training goes on; else a save ends when it is on the disk.
        say: told, on rank 0, what a user might wonder about.
        may_write: called on rank 0 before anything is written; raises where it must not be.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        keep: int,
        background: bool = True,
        say: Callable[[str], None] = _unsaid,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        self._trainer, self._folder, self._keep = trainer, folder, keep
        self._background, self._say, self._may_write = background, say, may_write
        self._flight: Flight | None = None
        self._room = np.empty(0, np.uint8)  # for what is being written; from save to save the same
        self._writers: tuple[int, list[int]] = (0, [])  # for so many ranks
        self._news: dict[str, Any] | None = None
        self._said_full = False
        trainer.in_place.when_lost.append(self._give_up)

    def begin(self, facts: Mapping[str, Any], keep: int | None = None) -> None:
        """Take what is to be saved, and have it written; a collective, which may be begun again.

        Args:
            facts: JSON values to be kept with it.
            keep: newest ones kept from then on; None: as ever.

        Raises:
            CheckpointError: the last one could not be written, or no folder can be made for this one.
        """
        trainer = self._trainer
        self.settle()
        trainer.put_together()
        facts = {**position(trainer), **facts}
        writers, final = self._who_writes(), checkpoint.path_of(self._folder, trainer.step)
        temporary = Path(on_root(trainer.comm, lambda: _begun(final)))
        plan = Plan(temporary, final, facts, writers, self._keep if keep is None else keep)
        whole = trainer.whole()
        sizes = [entry.size_bytes for entry in whole.entries]
        writer_of = shards.dealt(sizes, writers)
        mine = whole.shard(writer_of)
        flight = Flight(plan, trainer.comm.rank, self._may_write)
        # Who writes for others would need room for all that they hold.
        near = len(writers) == trainer.comm.size or trainer.mesh.plain
        size = shards.bytes_of(sizes, writer_of, trainer.comm.rank)
        if self._background and near and self._all_have_room(size):
            copies = self._copied(mine, size)
            trainer.comm.barrier()
            flight.start(copies)
        else:
            flight.write(mine)
            trainer.comm.barrier()
            flight.start(None)
        self._flight = flight

    def settle(self) -> dict[str, Any] | None:
        """Wait until the last checkpoint is on the disk; a collective, which may be begun again.

        Returns:
            Its step, weights_sha256 and val_loss; None where there was none, or it was given up.

        Raises:
            CheckpointError: on every rank, if any could not write.
        """
        comm, flight, begun = self._trainer.comm, self._flight, time.perf_counter()
        mine = None if flight is None else flight.written()
        failed = next((error for error in comm.allgather_obj(mine) if error), None)
        if flight is not None and failed:
            flight.give_up()
        outcome = None if flight is None else flight.ended()
        # Not a broadcast: no rank may leave before all have come.
        made, error = comm.allgather_obj([outcome, flight.error if flight is not None else None])[0]
        self._flight = None
        waited = time.perf_counter() - begun
        if comm.rank == 0 and flight is not None:
            flight.clear_away()
            self._news = flight.told()
            if outcome is None and not (failed or error):
                self._say(f"the checkpoint of step {flight.step} was not finished when a rank died")
            elif self._background and waited > LONG_S:
                self._say(f"waited {waited:.1f} s for the checkpoint of step {flight.step} to be written")
        if failed or error:
            raise CheckpointError(failed or error)
        return dict(made) if made else None

    def save(self, facts: Mapping[str, Any], keep: int | None = None) -> dict[str, Any] | None:
        """Save, and wait until it is on the disk; a collective, which may be begun again.

        Arguments are those of `begin`.

        Raises:
            CheckpointError: it could not be written.
        """
        self.begin(facts, keep)
        return self.settle()

    def news(self) -> dict[str, Any] | None:
        """What `settle` would return, once, if a checkpoint has been finished meanwhile; on rank 0.

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

    def _give_up(self) -> None:
        if self._flight is not None:
            self._flight.give_up()

    def abandon(self) -> None:
        """The training begins again without ranks that have died: nothing is written any more after this."""
        self._give_up()
        if self._flight is not None:
            self._flight.ended()

    def _all_have_room(self, size: int) -> bool:
        """Whether all ranks can copy so many bytes of their own, and keep them; a collective."""
        comm = self._trainer.comm
        mine = size <= self._room.size or has_room(SPARE * size, comm.size)
        fits = all(comm.allgather_obj(mine))
        if not fits and not self._said_full:
            self._said_full = True
            self._say("there is no room for a copy of what is saved: training waits while it is written")
        return fits

    def _copied(self, tensors: Iterator[shards.Numbered], size: int) -> list[shards.Numbered]:
        """Copies of tensors, in memory that the next save will use again."""
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
        """The ranks that see the folder of rank 0; a collective, found out once for so many ranks."""
        comm = self._trainer.comm
        if self._writers[0] != comm.size:
            name = Path(on_root(comm, self._probe))
            seen = comm.allgather_obj(name.exists())
            if comm.rank == 0:
                name.unlink(missing_ok=True)
            writers = [rank for rank, sees in enumerate(seen) if sees or rank == 0]
            self._writers = (comm.size, writers)
            if len(writers) < comm.size:
                self._say(
                    f"{len(writers)} of {comm.size} ranks see {self._folder}, and write all checkpoints"
                )
        return self._writers[1]

    def _probe(self) -> str:
        path = self._folder / f".probe-{secrets.token_hex(8)}"
        with shards.told_apart(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        return str(path)


def _begun(final: Path) -> str:
    with shards.told_apart(final):
        return str(shards.begin(final))
