"""The board of a node, and messages between boards; each rank as a node of its own, too."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.health.board_sync import BoardSync, nodes_of
from tf_dist.comm.health.status_board import FOLDERS, PREFIX, Heartbeat, private_board, shared_board
from tf_dist.comm.timers import CommTimers

pytestmark = pytest.mark.ranks(3)

LIMIT_S = 30


@pytest.fixture
def world():
    return MPI.COMM_WORLD.Dup()


def test_ranks_of_a_node_see_each_other_and_leave_no_file(world):
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    board = shared_board(node, world.size)
    assert board is not None
    Heartbeat(board, world.rank, 0)
    world.Barrier()
    pids = np.empty(world.size, np.int64)
    world.Allgather(np.array([os.getpid()], np.int64), pids)
    assert board.slots["pid"].tolist() == pids.tolist()
    leader = int(pids[0])
    assert not [path for folder in FOLDERS for path in Path(folder).glob(f"{PREFIX}*-{leader}-*")]
    assert nodes_of(world, node) == [list(range(world.size))]
    world.Barrier()


def test_no_memory_to_share_is_no_error(world, monkeypatch):
    """Where one of the ranks cannot open the file, none uses it."""
    import tf_dist.comm.health.status_board as slots

    if world.rank == world.size - 1:
        monkeypatch.setattr(slots, "_opened", lambda path, size: None)
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    assert shared_board(node, world.size) is None


def test_boards_of_nodes_become_alike(world):
    """Slots, in the clock of the one that reads, and the wish for stacks; nobody waits for a message."""
    board = private_board(world.size)
    nodes = nodes_of(world, MPI.COMM_SELF)
    assert nodes == [[rank] for rank in range(world.size)]
    record = CommTimers(waiting=("allreduce", time.monotonic() - 5.0))
    post, pulse = BoardSync(world, board, nodes), Heartbeat(board, world.rank, 0)
    if world.rank == world.size - 1:
        board.request_stacks(3)
    deadline = time.monotonic() + LIMIT_S
    while not (board.slots["beats"] > 2).all() or board.stacks_requested != 3:
        assert time.monotonic() < deadline, board.slots
        pulse.beat(record)
        post.exchange()
        time.sleep(0.1)
    ages = time.monotonic() - board.slots["since"]
    assert (ages > 4.9).all() and (ages < LIMIT_S).all()
    assert (board.slots["verb"] == b"allreduce").all() and (board.slots["pid"] > 0).all()
    others = np.delete(board.slots["process"], world.rank)
    assert set(others.tolist()) <= {b"R", b"S", b"D"}
    # As at the end of a job: all that was sent is taken before anybody goes.
    post.settle()
    request = world.Ibarrier()
    while not request.Test():
        post.exchange()
