"""The norm of a gradient in parts: the bits of one rank, whoever has which variable."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_comm import on_ranks

from tf_dist.comm.transport.reduction_order import SQUARES_BLOCK
from tf_dist.parallel.flat_buffer import norm
from tf_dist.parallel.global_norm import GlobalNorm, SquaredRun


def norms(whole, cuts, owners, ranks):
    """The norm as each rank has it, where stretch number i of the whole is on rank ``owners[i]``."""
    edges = [0, *sorted(cuts), whole.size]
    stretches = list(itertools.pairwise(edges))

    def on_rank(comm):
        mine = [cut for cut, owner in zip(stretches, owners, strict=True) if owner == comm.rank]
        parts = [whole[start:stop] for start, stop in mine]
        starts = np.cumsum([0, *map(len, parts)])
        runs = [
            SquaredRun(int(at), stop - start, start) for at, (start, stop) in zip(starts, mine, strict=False)
        ]
        made = GlobalNorm(comm, runs, whole.size)
        assert made.exact
        return made(np.concatenate([np.empty(0, np.float32), *parts]))

    return on_ranks(ranks, on_rank)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_bits_are_those_of_one_rank(data):
    size = data.draw(st.integers(1, 6 * SQUARES_BLOCK + 7))
    ranks = data.draw(st.integers(1, 3))
    cuts = data.draw(st.lists(st.integers(0, size), max_size=6))
    owners = data.draw(st.lists(st.integers(0, ranks - 1), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    whole = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    assert norms(whole, cuts, owners, ranks) == [norm(whole)] * ranks


@pytest.mark.parametrize("strange", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(strange):
    whole = np.ones(3 * SQUARES_BLOCK, np.float32)
    whole[5000] = strange
    assert not np.isfinite(norms(whole, [100, 9000], [0, 1, 0], 2)).any()


def test_tiny_and_huge_numbers_are_summed_in_float64():
    for value in (1e-30, 1e30):
        whole = np.full(SQUARES_BLOCK + 3, value, np.float32)
        assert norms(whole, [100], [0, 1], 2) == pytest.approx([norm(whole)] * 2, rel=1e-6)


def test_divided_variables_are_summed_in_float64():
    whole = np.random.default_rng(1).standard_normal(1000).astype(np.float32)

    def on_rank(comm):
        made = GlobalNorm(comm, [SquaredRun(0, 500, None)], whole.size)
        assert not made.exact
        return made(whole[comm.rank :: 2].copy())

    assert on_ranks(2, on_rank) == pytest.approx([norm(whole)] * 2, rel=1e-6)
