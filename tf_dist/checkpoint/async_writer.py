"""`AsyncWriter`: asynchronous write of one checkpoint, on one rank."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from tf_dist.checkpoint import shards, store
from tf_dist.checkpoint.sharded_state import sha256
from tf_dist.errors import CheckpointError, LaunchError

# How long rank 0 waits for shards of which none grows.
STANDSTILL_S = 120.0
LOOK_EVERY_S = 0.01


class SavedCheckpoint(TypedDict):
    """A checkpoint that is on disk."""

    step: int
    weights_sha256: str
    val_loss: float | None


class WritePlan(NamedTuple):
    """A checkpoint to be written.

    temporary: its folder until it is complete. final: then. facts: metadata. writers: ranks that write.
    keep: newest checkpoints kept.
    """

    temporary: Path
    final: Path
    facts: Mapping[str, Any]
    writers: Sequence[int]
    keep: int


class AsyncWriter:
    """Writes a rank's shard; on rank 0 also commits the checkpoint once all shards are written.

    Args:
        plan: the same on every rank.
        rank: this one.
        may_write: called on rank 0 before other checkpoints are touched; raises where they must not be.
        specs: of all tensors that this rank will write.

    Attributes:
        step: of the checkpoint.
        error: error message of this rank, if any.
        outcome: on rank 0, once it is on disk.
    """

    def __init__(
        self,
        plan: WritePlan,
        rank: int,
        may_write: Callable[[], None] = lambda: None,
        specs: Sequence[shards.TensorSpec] = (),
    ) -> None:
        self._plan, self._rank, self._may_write, self._specs = plan, rank, may_write, specs
        self.step = int(plan.final.name.removeprefix("step-"))
        self.error: str | None = None
        self.outcome: SavedCheckpoint | None = None
        self._told = False
        self._written, self._over, self._given_up = (threading.Event() for _ in range(3))

    def start(self, tensors: Iterable[shards.Numbered] | None) -> None:
        """Continue in a thread.

        Args:
            tensors: to be written first; None if `write` has written them.
        """
        # A daemon: a failing process does not wait for a disk. One that ends normally waits for the writer
        # first.
        threading.Thread(target=self._run, args=(tensors,), name="checkpoint", daemon=True).start()

    def write(self, tensors: Iterable[shards.Numbered]) -> None:
        """Write this rank's shard. Exhausts ``tensors``, as other ranks may wait in a collective."""
        tensors = iter(tensors)
        try:
            if self._rank in self._plan.writers:
                with shards.explain_disk_errors(self._plan.final):
                    shards.write_shard(self._plan.temporary, self._rank, self._specs, tensors)
        except CheckpointError as error:
            self.error = str(error)
        finally:
            deque(tensors, maxlen=0)

    def written(self) -> str | None:
        """Wait until this rank's shard is on disk; returns the error message, if any."""
        self._written.wait()
        return self.error

    def ended(self) -> SavedCheckpoint | None:
        """Wait until the writer has finished; returns `outcome`."""
        self._over.wait()
        return self.outcome

    @property
    def over(self) -> bool:
        """Whether the writer has finished."""
        return self._over.is_set()

    def told(self) -> SavedCheckpoint | None:
        """Return `outcome`, to the first caller only."""
        told, self._told = self._told, True
        return None if told else self.outcome

    def remove_incomplete(self) -> None:
        """Remove an incomplete checkpoint, once no rank writes to it any more."""
        shutil.rmtree(self._plan.temporary, ignore_errors=True)

    def give_up(self) -> None:
        """Stop waiting for other ranks: one has failed, or could not write."""
        self._given_up.set()

    def _run(self, tensors: Iterable[shards.Numbered] | None) -> None:
        try:
            if tensors is not None:
                self.write(tensors)
            self._written.set()
            if self._rank == 0 and not self.error and self._all_recorded():
                self._commit()
        except (CheckpointError, LaunchError) as error:
            self.error = str(error)
        except BaseException as error:  # of any kind: reported to the main thread
            self.error = f"the checkpoint {self._plan.final} failed: {type(error).__name__}: {error}"
        finally:
            self._written.set()
            self._over.set()

    def _all_recorded(self) -> bool:
        """Wait for the records of all writers; False if the wait was given up."""
        plan, size, since = self._plan, -1, time.monotonic()
        while True:
            missing = [rank for rank in plan.writers if not shards.recorded(plan.temporary, rank)]
            if not missing:
                return True
            if self._given_up.wait(LOOK_EVERY_S):
                return False
            now = _bytes_in(plan.temporary)
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > STANDSTILL_S:
                who = "rank " + " ".join(map(str, missing))
                raise CheckpointError(
                    f"cannot write the checkpoint {plan.final}: for {STANDSTILL_S:.0f} s nothing has come "
                    f"from {who}. Look for a slow or full disk there; older checkpoints are untouched"
                )

    def _commit(self) -> None:
        plan = self._plan
        self._may_write()
        with shards.explain_disk_errors(plan.final):
            shards.commit(plan.temporary, plan.final, plan.facts, plan.writers)
        if plan.facts.get("val_loss_step") == self.step:  # else it belongs to an earlier step
            store.mark_if_best(plan.final, plan.facts.get("val_loss"))
        store.prune(plan.final.parent, plan.keep, self.step)
        weights = store.read_tensors(store.open_checkpoint(plan.final), "weights/")
        found = sha256(array for _, array in weights)
        self.outcome = {"step": self.step, "weights_sha256": found, "val_loss": plan.facts.get("val_loss")}


def _bytes_in(folder: Path) -> int:
    size = 0
    with os.scandir(folder) as found:
        for one in found:
            with contextlib.suppress(FileNotFoundError):  # a record that is renamed at this moment
                size += one.stat(follow_symlinks=False).st_size
    return size
