"""Copies in memory at neighbours: what is found after a death, by those that are left."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.thread_comm import on_ranks
from tf_dist.checkpoint import shards
from tf_dist.checkpoint.sharded_state import Entry
from tf_dist.errors import CheckpointError
from tf_dist.training import in_memory_checkpoint
from tf_dist.training.in_memory_checkpoint import PeerCheckpoints, partners
from tf_dist.training.snapshot import recover, snapshot_of
from tf_dist.training.train_state import TrainState

KINDS = [("weights/0000/a", (4, 3), "float32"), ("weights/0001/b", (5,), "bool")]
KINDS += [("optimizer/0000/m", (4, 3), "float32"), ("optimizer/0001/steps", (), "int64")]


class ShardedState:
    """Tensors of one step, as if ranks had to put them together; and what was given back to this rank."""

    def __init__(self, comm, step, kinds):
        self.mesh, self.back = SimpleNamespace(all=comm), {}
        self.entries = [Entry(*kind) for kind in kinds]
        self.arrays = values(step)

    def shard(self, owner_of):
        for number, (entry, owner) in enumerate(zip(self.entries, owner_of, strict=True)):
            if owner == self.mesh.all.rank:
                yield number, entry.name, self.arrays[entry.name]

    def set(self, entry, tensor, root=0):
        array = np.zeros(entry.shape, entry.dtype).reshape(-1)
        if tensor is not None:
            array[:] = tensor.reshape(-1)
        self.mesh.all.broadcast(array, root)
        self.back[entry.name] = array.reshape(entry.shape)


def values(step):
    return {
        name: np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape) + step).astype(dtype)
        for name, shape, dtype in KINDS
    }


class Trainer:
    """A trainer of which only the state matters."""

    def __init__(self, comm, step, kinds=KINDS):
        self.comm, self.held = comm, ShardedState(comm, step, kinds)
        self.state = TrainState(step, tokens=100 * step, elapsed_s=0.5, xla=step > 0)

    def whole(self):
        return self.held


def kept(ranks, steps, kinds=KINDS):
    """What each of several ranks keeps, once all have kept copies of some steps."""

    def keep(comm):
        one = PeerCheckpoints()
        for step in steps:
            one.save(snapshot_of(Trainer(comm, step, kinds), {"val_loss": float(step)}))
        return one

    made = on_ranks(ranks, keep)
    assert all(isinstance(one, PeerCheckpoints) for one in made), made
    return made


def given_back(left, kinds=KINDS):
    """What is given back to ranks that have this of former times; None where nothing can be."""

    def restore(comm):
        trainer, mine = Trainer(comm, 0, kinds), left[comm.rank]
        found = recover([mine], trainer)
        assert found is None or (found.source, found.step) == (mine, trainer.state.step)
        return None if found is None else trainer

    return on_ranks(len(left), restore)


@pytest.mark.parametrize(("ranks", "dead"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_what_the_dead_had_is_at_another_one(ranks, dead):
    left = kept(ranks, [3, 4])
    del left[dead]
    for trainer in given_back(left):
        assert trainer.state.counters[:2] == [4, 400] and trainer.state.elapsed_s == 0.5 and trainer.state.xla
        assert trainer.state.val_loss == 4.0
        assert trainer.held.back.keys() == values(4).keys()
        for name, array in values(4).items():
            np.testing.assert_array_equal(trainer.held.back[name], array)
            assert trainer.held.back[name].dtype == array.dtype


def test_two_that_are_not_neighbours_may_die():
    left = kept(4, [7])
    for trainer in given_back([left[0], left[2]]):
        np.testing.assert_array_equal(trainer.held.back["optimizer/0000/m"], values(7)["optimizer/0000/m"])


def test_a_rank_and_who_has_its_copy():
    left = kept(4, [7])
    assert given_back([left[2], left[3]]) == [None, None]


def test_copies_that_are_not_finished_do_not_count():
    """Somebody has died while they were made: the others have those before."""
    left = kept(3, [5, 6])
    del left[1]
    left[0]._kept.pop()
    assert [trainer.state.step for trainer in given_back(left)] == [5, 5]
    assert [[kept.step for kept in one._kept] for one in left] == [[5], [5]]


def test_what_was_kept_by_fewer_is_newer_than_what_was_kept_by_all():
    """A training that was begun again from an earlier step; one rank had nothing to do in the first one."""
    left = [*kept(2, [8, 9]), PeerCheckpoints()]

    def keep(comm):
        one = left[comm.rank + 1]
        one.save(snapshot_of(Trainer(comm, 6)), restarts=1)
        return one

    assert on_ranks(2, keep) == left[1:]
    found = given_back(left[1:])
    assert [trainer.state.step for trainer in found] == [6, 6]


def test_a_training_that_goes_back_forgets():
    left = kept(3, [5, 6])
    for one in left:
        one.forget()
    assert given_back(left) == [None] * 3


def test_memory_is_used_again_and_two_times_are_kept():
    def keep(comm):
        one, seen = PeerCheckpoints(), []
        for step in range(6):
            one.save(snapshot_of(Trainer(comm, step)))
            seen.append({share.ctypes.data for kept in one._kept for share in kept.parts.values()})
            assert [kept.step for kept in one._kept] == [step - 1, step][-(step + 1) :]
        return seen

    for places in on_ranks(2, keep):
        assert [len(one) for one in places] == [2, 4, 4, 4, 4, 4] and places[1] == places[5]


def test_where_there_is_no_room_nothing_is_kept(monkeypatch, told):
    monkeypatch.setattr(in_memory_checkpoint, "has_room", lambda wanted, ranks: False)

    def keep(comm):
        one = PeerCheckpoints()
        for step in (1, 2):
            one.save(snapshot_of(Trainer(comm, step)))
        return one

    left = on_ranks(2, keep)
    assert given_back(left) == [None, None]
    said = told.messages
    assert len(said) == 2 and "no memory for peer copies" in said[0]  # once on each; the first one is heard


def test_alone_nobody_has_a_copy():
    assert given_back(kept(1, [3])) == [None]


def test_another_model_is_refused():
    left = kept(2, [3])
    others = [*KINDS[:-1], ("optimizer/0001/steps", (2,), "int64")]
    for error in given_back(left[1:], others):
        assert isinstance(error, CheckpointError) and "memory (--replicate) holds 4 tensors" in str(error)


@pytest.mark.parametrize(
    ("hosts", "to"),
    [
        ("aaa", [1, 2, 0]),
        ("ab", [1, 0]),
        ("aabb", [2, 3, 1, 0]),
        ("abab", [1, 2, 3, 0]),
        ("aabbcc", [2, 3, 4, 5, 1, 0]),
    ],
)
def test_partners_are_on_other_hosts(hosts, to):
    assert [partners(hosts, rank)[0] for rank in range(len(hosts))] == to
    for rank, other in enumerate(to):
        assert partners(hosts, other)[1] == rank
        assert len(set(hosts)) == 1 or hosts[other] != hosts[rank]


def test_shares_are_even():
    sizes = [entry.size_bytes for entry in map(lambda kind: Entry(*kind), KINDS)]
    assert sorted(shards.assign(sizes, range(2))) == [0, 0, 1, 1]


def test_ranks_that_are_too_many_hand_over_what_they_have():
    """Of four ranks, the last has died, and the third does not train."""
    left = kept(4, [3, 4])[:3]
    assert given_back(left[:2]) == [None, None]
    on_ranks(3, lambda comm: left[comm.rank].hand_over(comm, 2))
    assert [trainer.state.step for trainer in given_back(left[:2])] == [4, 4]
    for trainer in given_back(left[:2]):
        for name, array in values(4).items():
            np.testing.assert_array_equal(trainer.held.back[name], array)
