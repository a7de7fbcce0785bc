"""Communicators that a script has at hand: as_comm gives one Comm for each, also for a part of the ranks."""

import numpy as np
import pytest
from mpi4py import MPI

import tf_dist
from tf_dist.comm.runtime import communicators, launch
from tf_dist.comm.runtime.communicators import as_comm
from tf_dist.errors import UsageError

pytestmark = pytest.mark.ranks(2, 3)


@pytest.fixture(autouse=True)
def newest(monkeypatch, connected):
    """Tests of a backend have connected again, by Horovod: here the first Comm is the one that counts."""
    monkeypatch.setattr(launch, "_connected", connected)


@pytest.fixture
def fresh_members(monkeypatch, connected):
    """Nobody has been named yet whom this rank trains with."""
    monkeypatch.setattr(launch._ending, "_together", [])
    return launch._ending.members


def test_the_world_is_what_connect_has_given(connected):
    assert as_comm(MPI.COMM_WORLD) is connected
    assert as_comm(connected) is connected
    assert tf_dist.as_comm is as_comm


def test_connected_is_the_comm_of_this_process(connected):
    assert communicators.connected() is connected


def test_a_communicator_is_duplicated_once_whatever_it_is_called(connected):
    mine = MPI.COMM_WORLD.Dup()
    first = as_comm(mine)
    assert as_comm(MPI.Comm.fromhandle(mine.handle)) is first
    assert (first.rank, first.size) == (mine.rank, mine.size)
    other = MPI.COMM_WORLD.Dup()
    assert other.Get_attr(MPI.TAG_UB)  # a communicator as any
    if connected.size > 1:
        assert as_comm(other) is not first


def test_parts_of_the_ranks_train_side_by_side(connected, fresh_members):
    world = MPI.COMM_WORLD
    color = world.rank % 2
    part = as_comm(world.Split(color, world.rank))
    ours = [rank for rank in range(world.size) if rank % 2 == color]
    assert part.size == len(ours)
    assert part.origin == ours
    for _ in range(3 + 4 * color):  # as often as they like
        numbers = np.full(5, world.rank, np.float64)
        part.allreduce(numbers)
        assert numbers.tolist() == [sum(ours)] * 5
    assert fresh_members() == set(ours)
    as_comm(connected)
    assert fresh_members() == set(range(world.size)) or world.size == 1


def test_groups_of_a_grid_know_who_they_are(connected):
    if connected.size != 4:
        pytest.skip("a grid of two by two")
    rows, columns = connected.grid((2, 2), [[0], [1]])
    assert rows.origin == [connected.rank % 2, connected.rank % 2 + 2]
    assert columns.origin == [connected.rank // 2 * 2, connected.rank // 2 * 2 + 1]


def test_one_rank_alone(connected):
    alone = as_comm(MPI.COMM_SELF)
    assert alone.size == 1
    assert alone.origin == [MPI.COMM_WORLD.rank]


def test_what_is_no_communicator_of_ranks_is_refused(connected):
    freed = MPI.COMM_WORLD.Dup()
    freed.Free()
    for nothing in (freed, MPI.COMM_NULL):
        with pytest.raises(UsageError, match="COMM_NULL"):
            as_comm(nothing)
    for other in ("mpi", 3, None, MPI):
        with pytest.raises(UsageError, match="not as "):
            as_comm(other)
    if MPI.COMM_WORLD.size > 1:
        world = MPI.COMM_WORLD
        half = world.Split(world.rank % 2, world.rank)
        between = half.Create_intercomm(0, world, 1 - world.rank % 2)
        with pytest.raises(UsageError, match="Merge"):
            as_comm(between)
