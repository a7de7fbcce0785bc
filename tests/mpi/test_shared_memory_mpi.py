"""Sums in a window that the ranks of this machine share: the bits of one rank, and nobody reads too late."""

import os
import time

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport import shared_memory
from tf_dist.comm.transport.mpi import MPIComm
from tf_dist.comm.transport.reduction_order import SQUARES_BLOCK, block_squares
from tf_dist.data.sampler import share
from tf_dist.parallel.flat_buffer import norm
from tf_dist.parallel.reduction_tree import BlockSum, TreeSum, order

pytestmark = pytest.mark.ranks(4)

TURNS = 3
LENGTHS = [1, 17, SQUARES_BLOCK, 3 * SQUARES_BLOCK + 5, 300_007]


def leaf(number, turn, length):
    return np.random.default_rng([number, turn]).standard_normal(length).astype(np.float32)


def whole(leaves, turn, length):
    tree = TreeSum(length)
    for number in range(leaves):
        tree.add(leaf(number, turn, length))
    return tree.result()


def summed(comm, leaves, length, buffers=None):
    """A function that adds this rank's leaves of a turn and sums them over the ranks."""
    blocks = [share(leaves, rank, comm.size) for rank in range(comm.size)]
    made = order(range(leaves), blocks)
    mine = BlockSum(length, range(leaves), blocks[comm.rank], buffers and buffers(length, made))

    def work(turn, verb="allreduce_terms"):
        for number in blocks[comm.rank]:
            mine.add(leaf(number, turn, length))
        return getattr(comm, verb)(mine.terms(), made, np.empty(length, np.float32))

    return work


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_bits_of_one_rank(ranks, everyone, leaves, length):
    work, wrong = summed(ranks, leaves, length, ranks.term_buffers), []
    for turn in range(TURNS):
        array, squares = work(turn)
        expected = whole(leaves, turn, length)
        blocks = np.empty(length // SQUARES_BLOCK, np.float32)
        block_squares(expected, blocks)
        if array.tobytes() != expected.tobytes() or squares.tobytes() != blocks.tobytes():
            wrong.append((turn, array[:3], expected[:3]))
        elif norm(array, squares) != norm(expected):
            wrong.append((turn, norm(array, squares), norm(expected)))
    assert everyone((ranks.carried_by, wrong)) == [("a shared window", [])] * ranks.size


def test_only_the_root_of_a_reduction_gets_it(ranks, everyone):
    work = summed(ranks, 4, 10_001, ranks.term_buffers)
    found = work(0, "reduce_terms")
    right = found.array.tobytes() == whole(4, 0, 10_001).tobytes() if ranks.rank == 0 else found is None
    assert all(everyone(right))


def test_terms_from_elsewhere_are_copied_into_it(ranks, everyone):
    """Another trainer of the same sizes, or a caller who brings arrays of his own."""
    ranks.term_buffers(10_001, order(range(4), [share(4, rank, ranks.size) for rank in range(ranks.size)]))
    work = summed(ranks, 4, 10_001)
    found = [work(turn).array.tobytes() == whole(4, turn, 10_001).tobytes() for turn in range(TURNS)]
    assert all(everyone(all(found)))


def test_another_type_of_the_same_length_goes_by_messages(ranks, everyone):
    made = order(range(ranks.size), [range(rank, rank + 1) for rank in range(ranks.size)])
    ranks.term_buffers(1001, made)
    array = np.full(1001, 1e-9 * (ranks.rank + 1))
    ranks.allreduce_terms([array], made, array)
    total = 1e-9 * ranks.size * (ranks.size + 1) / 2
    assert all(everyone(bool(abs(array - total).max() < 1e-24)))


def test_a_fast_rank_does_not_write_what_a_slow_one_reads(ranks, everyone):
    length = 100_003
    work, right = summed(ranks, 4, length, ranks.term_buffers), []
    for turn in range(6):
        array, _ = work(turn)
        if (ranks.rank + turn) % ranks.size:
            time.sleep(0.02)  # the others have written their terms of the next turn by now
        right.append(array.tobytes() == whole(4, turn, length).tobytes())
    assert all(everyone(all(right)))


def test_without_room_messages_carry_it(ranks, everyone, monkeypatch):
    class Full:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    work = summed(ranks, 4, 123_457, ranks.term_buffers)
    right = work(0).array.tobytes() == whole(4, 0, 123_457).tobytes()
    said = f"messages: {shared_memory.SHARED_MEMORY} has 0 MB left, "
    assert all(everyone(right and ranks.carried_by.startswith(said)))


def test_no_window_if_none_is_wanted(connected, everyone):
    comm = MPIComm(window=False)
    right = summed(comm, 4, 1001, comm.term_buffers)(0).array.tobytes() == whole(4, 0, 1001).tobytes()
    assert all(everyone(right and comm.carried_by == "messages: no window was wanted"))


def test_nodes_of_different_sizes_use_messages(connected, everyone):
    world = MPI.COMM_WORLD
    if world.size < 3:
        pytest.skip("needs three ranks")
    comm = MPIComm(node=world.Split(int(world.rank == 0)))
    right = summed(comm, 4, 1001, comm.term_buffers)(0).array.tobytes() == whole(4, 0, 1001).tobytes()
    assert all(everyone(right and comm.carried_by == "messages: nodes have different numbers of ranks"))
