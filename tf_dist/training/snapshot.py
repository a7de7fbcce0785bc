"""`Snapshot`: a training at one step. Where snapshots are kept, and `recover`, which asks these places.

Three stores keep snapshots, from fast to slow: a rank's own memory (`tf_dist.training.replay.OwnMemory`), the
memory of peers (`tf_dist.training.in_memory_checkpoint.PeerCheckpoints`), and disk
(`tf_dist.training.checkpoint_manager.CheckpointManager`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tf_dist.checkpoint import store
from tf_dist.checkpoint.sharded_state import Entry, ShardedState
from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import CheckpointError
from tf_dist.training.strategy_state import REMEMBERED
from tf_dist.training.train_state import Stateful

LOG = logging.getLogger(__name__)
# Called on rank 0 with where a snapshot comes from and its state; raises if it is not of this run.
Check = Callable[[Path, Mapping[str, Any]], object]


class Snapshot(NamedTuple):
    """A training between two steps.

    state: JSON values: `TrainState.state_dict`, and what a job adds. shards: of all tensors, as this rank
    holds them: of the model and optimizer, not copies.
    """

    state: dict[str, Any]
    shards: ShardedState

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.state["step"])


def snapshot_of(trainer: Stateful, facts: Mapping[str, Any] | None = None) -> Snapshot:
    """The snapshot of a trainer whose state is gathered (`Stateful.gather_state`); a collective.

    Args:
        trainer: whose state it is.
        facts: JSON values to be kept with it.
    """
    return Snapshot({**trainer.state.state_dict(), **(facts or {})}, trainer.whole())


class DamagedSnapshot(CheckpointError):
    """A snapshot cannot be read; raised on all ranks, which still have the state that they had.

    Args:
        path: of the snapshot.
        damage: what is wrong.
    """

    def __init__(self, path: Path, damage: str) -> None:
        super().__init__(damage)
        self.path = path


class NoneValid(CheckpointError):
    """There are snapshots, and none of them can be read; raised on all ranks."""


class SnapshotSource(Protocol):
    """Has snapshots of a training. Each method is a collective."""

    def newest(self, comm: Comm, before: int | None = None) -> int | None:
        """The step of the newest snapshot that is complete, the same on all ranks; None if there is none.

        Args:
            comm: all ranks of the training.
            before: only snapshots of earlier steps count.
        """

    def restore(self, step: int, into: ShardedState, check: Check | None = None) -> dict[str, Any]:
        """Set all tensors to those of a snapshot; each byte is read once.

        Args:
            step: from `newest`.
            into: receives the tensors.
            check: applied before anything is read; only to what may be of another run.

        Returns:
            The state of the snapshot.

        Raises:
            DamagedSnapshot: it cannot be read; nothing is changed.
            CheckpointError: it is of another model, optimizer or run; nothing is changed.
        """

    def where(self, step: int) -> str:
        """What messages call the place of a snapshot."""


class SnapshotStore(SnapshotSource, Protocol):
    """Keeps snapshots of a training."""

    def save(self, snapshot: Snapshot) -> object:
        """Keep a snapshot; a collective."""


class Restored(NamedTuple):
    """What `recover` has found."""

    step: int
    source: SnapshotSource


def recover(
    sources: Sequence[SnapshotSource],
    trainer: Stateful,
    *,
    before: int | None = None,
    check: Check | None = None,
    turn_to: Callable[[SnapshotSource], object] = lambda source: None,
) -> Restored | None:
    """Restore a trainer from the latest snapshot, of equal ones from the fastest source; a collective.

    A slower source is used only if it has a later step, or the snapshot of a faster one is damaged.

    Args:
        sources: from fast to slow.
        trainer: receives the state.
        before: only snapshots of earlier steps count; None: all.
        check: as in `SnapshotSource.restore`.
        turn_to: called on all ranks before the first snapshot of a source is read.

    Returns:
        The step and its source; None if no source has a snapshot.

    Raises:
        NoneValid: all snapshots are damaged; the trainer has the state that it had.
        CheckpointError: one is of another model, optimizer or run.
    """
    comm = trainer.comm
    steps = [source.newest(comm, before) for source in sources]
    turned_to: SnapshotSource | None = None
    damaged: list[Path] = []
    while (latest := max((step for step in steps if step is not None), default=None)) is not None:
        number = steps.index(latest)
        source = sources[number]
        if source is not turned_to:
            turn_to(source)
            turned_to = source
        try:
            state = source.restore(latest, trainer.whole(), check)
        except DamagedSnapshot as error:
            once(LOG, comm).warning(f"skipping {error.path.name}: {error}")
            damaged.append(error.path)
            steps[number] = source.newest(comm, before=latest)
            continue
        trainer.state.load_state_dict(state)
        return Restored(latest, source)
    if damaged:
        raise NoneValid(str(store.none_sound(damaged)))
    return None


def matching(saved: list[dict[str, Any]], entries: list[Entry], where: str) -> list[int | None]:
    """For each tensor of a trainer, which tensor of a snapshot it is.

    Args:
        saved: name, shape and dtype of each, in order; the state of strategies comes last.
        entries: of the trainer.
        where: place of the snapshot, for the error.

    Returns:
        Indices into ``saved``, ascending from 0; None for state that the strategy of the snapshot lacks.

    Raises:
        CheckpointError: they are of another model or optimizer.
    """
    _check_fits(saved, entries, where)
    found = [(_kind(one["name"]), tuple(one["shape"])) for one in saved]
    same_strategy = found == [(_kind(entry.name), entry.shape) for entry in entries]
    return [
        number if same_strategy or not entry.name.startswith(REMEMBERED) else None
        for number, entry in enumerate(entries)
    ]


def _kind(name: str) -> str:
    """What is left of a tensor's name, as Keras renumbers layers in every process."""
    return name.split("/")[1] if name.startswith(REMEMBERED) else ""


def _check_fits(saved: list[dict[str, Any]], entries: list[Entry], where: str) -> None:
    # By place, not by name: Keras renumbers layers in every process. A run may resume with another strategy.
    saved = [tensor for tensor in saved if not tensor["name"].startswith(REMEMBERED)]
    entries = [entry for entry in entries if not entry.name.startswith(REMEMBERED)]
    found = [(tuple(tensor["shape"]), tensor["dtype"]) for tensor in saved]
    if found != [(entry.shape, entry.dtype) for entry in entries]:
        raise CheckpointError(
            f"{where} holds {len(found)} tensors that are not the {len(entries)} of this model and "
            "optimizer. Give the options it was made with, or start anew with --resume never"
        )
