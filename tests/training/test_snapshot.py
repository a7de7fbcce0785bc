"""Which snapshot a training is restored from: the latest, of equal ones the fastest; never a damaged one."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import CheckpointError
from tf_dist.training.checkpoint_manager import CheckpointManager
from tf_dist.training.in_memory_checkpoint import PeerCheckpoints
from tf_dist.training.replay import OwnMemory
from tf_dist.training.snapshot import DamagedSnapshot, NoneValid, SnapshotStore, recover
from tf_dist.training.train_state import TrainState

FOREIGN = "of another model"


class Source:
    """Snapshots of some steps, of which some are damaged; it writes down which ones are read."""

    def __init__(self, name, steps, damaged=(), foreign=()):
        self.name, self.steps, self.damaged, self.foreign = name, list(steps), damaged, foreign

    def newest(self, comm, before=None):
        return max((step for step in self.steps if before is None or step < before), default=None)

    def restore(self, step, into, check=None):
        into.append((self.name, step))
        if step in self.damaged:
            raise DamagedSnapshot(Path(f"step-{step}"), "a bit has flipped")
        if step in self.foreign:
            raise CheckpointError(FOREIGN)
        return {"step": step, "tokens": 10 * step, "elapsed_s": 1.0}

    def where(self, step):
        return f"{self.name} {step}"


class Trainer:
    """A trainer at step 99, whose tensors are the list of snapshots that were read."""

    def __init__(self):
        self.comm, self.state, self.read = SerialComm(), TrainState(99), []

    def whole(self):
        return self.read


def recovered(*sources, **options):
    trainer, turned = Trainer(), []
    try:
        found = recover(sources, trainer, turn_to=lambda one: turned.append(one.name), **options)
    except CheckpointError as error:
        found = error
    assert trainer.state.step == (getattr(found, "step", 99))
    where = found.source.where(found.step) if hasattr(found, "step") else found
    return SimpleNamespace(where=where, read=trainer.read, turned=turned)


@pytest.mark.parametrize(
    ("fast", "slow", "where"),
    [
        ([36], [30], "memory 36"),
        ([36], [30, 40], "disk 40"),  # later than what is in memory
        ([36], [36], "memory 36"),
        ([], [30, 20], "disk 30"),
        ([36], [], "memory 36"),
        ([], [], None),
    ],
)
def test_the_latest_of_the_fastest(told, fast, slow, where):
    found = recovered(Source("memory", fast), Source("disk", slow))
    assert found.where == where and not told.messages
    assert len(found.read) == len(found.turned) == (where is not None)  # nothing else is read


def test_a_damaged_one_is_said_and_the_next_later_one_is_taken(told):
    found = recovered(Source("memory", [36]), Source("disk", [20, 30, 40, 50], damaged=[40, 50]))
    assert found.where == "memory 36" and found.turned == ["disk", "memory"]
    assert found.read == [("disk", 50), ("disk", 40), ("memory", 36)]
    assert told.messages == ["skipping step-50: a bit has flipped", "skipping step-40: a bit has flipped"]
    found = recovered(Source("memory", []), Source("disk", [20, 30, 40], damaged=[40]))
    assert found.where == "disk 30" and found.turned == ["disk"]


def test_none_is_valid(told):
    found = recovered(Source("memory", []), Source("disk", [20, 30], damaged=[20, 30]))
    assert isinstance(found.where, NoneValid) and found.where.exit_code == 77
    assert "none of the 2 checkpoints" in str(found.where) and len(told.messages) == 2


def test_a_foreign_one_is_an_error_and_no_older_one_is_tried():
    found = recovered(Source("disk", [20, 30], foreign=[30]))
    assert str(found.where) == FOREIGN and found.read == [("disk", 30)]


def test_only_before_a_step():
    assert recovered(Source("disk", [20, 30, 40]), before=40).where == "disk 30"
    assert recovered(Source("disk", [20, 30, 40], damaged=[30]), before=40).where == "disk 20"
    assert recovered(Source("disk", [20, 30, 40]), before=20).where is None


def test_the_three_stores(tmp_path):
    """None of them has a snapshot yet."""
    stores: list[SnapshotStore] = [
        OwnMemory(), PeerCheckpoints(), CheckpointManager(SerialComm(), tmp_path, 3),
    ]  # fmt: skip
    assert [one.newest(SerialComm()) for one in stores] == [None, None, None]
    assert recover(stores, Trainer()) is None
