"""`Flight`: one checkpoint on its way to the disk, as one rank sees it."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tf_dist.errors import CheckpointError, LaunchError
from tf_dist.training import checkpoint, shards
from tf_dist.training.manifest import read_manifest
from tf_dist.training.whole import sha256

# How long rank 0 waits for shards of which not one grows.
STANDSTILL_S = 120.0
LOOK_EVERY_S = 0.01


class Plan(NamedTuple):
    """A checkpoint to be written.

    temporary: its folder until it is whole. final: then. facts: kept with it. writers: ranks that write.
    keep: newest checkpoints kept.
    """

    temporary: Path
    final: Path
    facts: Mapping[str, Any]
    writers: Sequence[int]
    keep: int


class Flight:
    """Writes a rank's shard, and on rank 0 makes a checkpoint of all shards.

    Args:
        plan: the same on every rank.
        rank: this one.
        may_write: called on rank 0 before other checkpoints are touched; raises where they must not be.

    Attributes:
        step: of the checkpoint.
        error: what went wrong on this rank, if anything.
        outcome: on rank 0, once it is on the disk: its step, weights_sha256 and val_loss.
    """

    def __init__(self, plan: Plan, rank: int, may_write: Callable[[], None] = lambda: None) -> None:
        self._plan, self._rank, self._may_write = plan, rank, may_write
        self.step = int(plan.final.name.removeprefix("step-"))
        self.error: str | None = None
        self.outcome: dict[str, Any] | None = None
        self._told = False
        self._written, self._over, self._given_up = (threading.Event() for _ in range(3))

    def start(self, tensors: Iterable[shards.Numbered] | None) -> None:
        """Do the rest in a thread.

        Args:
            tensors: to be written first; None where `write` has done it.
        """
        # A daemon: a process that ends badly does not wait for a disk. One that ends well has settled.
        threading.Thread(target=self._run, args=(tensors,), name="checkpoint", daemon=True).start()

    def write(self, tensors: Iterable[shards.Numbered]) -> None:
        """Write this rank's shard. Tensors are asked for to their end, for other ranks may wait for that."""
        tensors = iter(tensors)
        try:
            if self._rank in self._plan.writers:
                with shards.told_apart(self._plan.final):
                    shards.write_shard(self._plan.temporary, self._rank, tensors)
        except CheckpointError as error:
            self.error = str(error)
        finally:
            deque(tensors, maxlen=0)

    def written(self) -> str | None:
        """Wait until this rank's shard is on the disk; what went wrong."""
        self._written.wait()
        return self.error

    def ended(self) -> dict[str, Any] | None:
        """Wait until nothing more will happen; `outcome`."""
        self._over.wait()
        return self.outcome

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self._over.is_set()

    def told(self) -> dict[str, Any] | None:
        """`outcome`, to the first who asks."""
        told, self._told = self._told, True
        return None if told else self.outcome

    def clear_away(self) -> None:
        """Remove what is half written, now that nobody writes there any more."""
        shutil.rmtree(self._plan.temporary, ignore_errors=True)

    def give_up(self) -> None:
        """Wait for no other rank any more: one has died, or could not write."""
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
        except BaseException as error:  # whatever it is, the other thread is to hear of it
            self.error = f"the checkpoint {self._plan.final} failed: {type(error).__name__}: {error}"
        finally:
            self._written.set()
            self._over.set()

    def _all_recorded(self) -> bool:
        """Wait for the records of all writers; False where that was given up."""
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
        with shards.told_apart(plan.final):
            shards.commit(plan.temporary, plan.final, plan.facts, plan.writers)
        if plan.facts.get("val_loss_step") == self.step:  # else it is of an earlier step
            checkpoint.mark_if_best(plan.final, plan.facts.get("val_loss"))
        checkpoint.prune(plan.final.parent, plan.keep, self.step)
        weights = checkpoint.read_tensors(plan.final, read_manifest(plan.final), "weights/")
        found = sha256(array for _, array in weights)
        self.outcome = {"step": self.step, "weights_sha256": found, "val_loss": plan.facts.get("val_loss")}


def _bytes_in(folder: Path) -> int:
    size = 0
    with os.scandir(folder) as found:
        for one in found:
            with contextlib.suppress(FileNotFoundError):  # a record that gets its name at this moment
                size += one.stat(follow_symlinks=False).st_size
    return size
