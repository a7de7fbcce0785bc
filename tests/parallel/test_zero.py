"""Sums of which each rank keeps a shard: the bits of one rank, however many ranks, leaves and stretches."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_comm import on_ranks

from tf_dist.comm.transport.reduction_order import SQUARES_BLOCK, slices_of_blocks
from tf_dist.parallel import reduce_scatter
from tf_dist.parallel.reduce_scatter import ShardSums, dealt
from tf_dist.parallel.reduction_tree import TreeSum


def slices_along(length, cuts):
    """The whole array in stretches, the last one first, as a backward pass makes them."""
    edges = sorted({0, *cuts, length})
    return [slice(*pair) for pair in itertools.pairwise(edges)][::-1]


def serial(gradients):
    tree = TreeSum(gradients[0].size)
    for gradient in gradients:
        tree.add(gradient)
    return tree.result()


def shards_of_sum(ranks, gradients, stretches, breadth_first=False, steps=2):
    """The shards of all ranks, put together, after some steps with the same object."""
    length, count = gradients[0].size, len(gradients)
    shards = slices_of_blocks(length, ranks)

    def on_rank(comm):
        mine = dealt(count, comm.rank, comm.size)
        sums = ShardSums(comm, shards, count, stretches)
        orders = itertools.product(range(len(stretches)), range(sums.rounds))
        if not breadth_first:
            orders = sorted(orders, key=lambda pair: (pair[1], pair[0]))
        orders = list(orders)
        for _ in range(steps):
            for stretch, turn in orders:
                part = [gradients[mine[turn]][stretches[stretch]]] if turn < len(mine) else []
                sums.add(stretch, turn, [half for one in part for half in np.array_split(one, 2)])
            found = sums.result().copy()
        return found

    return np.concatenate(on_ranks(ranks, on_rank))


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.integers(1, 4),
    count=st.integers(1, 7),
    length=st.integers(1, 5 * SQUARES_BLOCK),
    cuts=st.lists(st.integers(1, 5 * SQUARES_BLOCK), max_size=3),
    breadth_first=st.booleans(),
)
def test_shards_are_those_of_one_ranks_sum(ranks, count, length, cuts, breadth_first):
    random = np.random.default_rng(length)
    gradients = [random.normal(size=length).astype(np.float32) for _ in range(count)]
    stretches = slices_along(length, [cut for cut in cuts if cut < length])
    found = shards_of_sum(ranks, gradients, stretches, breadth_first)
    np.testing.assert_array_equal(found, serial(gradients))


@pytest.mark.parametrize("ranks", [2, 3])
def test_large_stretches_travel_in_pieces(monkeypatch, ranks):
    monkeypatch.setattr(reduce_scatter, "PIECE", 1000)
    random = np.random.default_rng(1)
    gradients = [random.normal(size=7 * SQUARES_BLOCK + 5).astype(np.float32) for _ in range(5)]
    found = shards_of_sum(ranks, gradients, slices_along(gradients[0].size, [9001]))
    np.testing.assert_array_equal(found, serial(gradients))


def test_a_stretch_that_did_not_come_from_all_is_noticed():
    def on_rank(comm):
        sums = ShardSums(comm, [slice(0, 4)], 2, [slice(0, 4)])
        sums.add(0, 0, [np.ones(4, np.float32)])
        with pytest.raises(AssertionError, match="has not come"):
            sums.result()

    assert on_ranks(1, on_rank) == [None]


def test_micro_batches_are_dealt_by_turns():
    assert [list(dealt(5, rank, 3)) for rank in range(3)] == [[0, 3], [1, 4], [2]]
