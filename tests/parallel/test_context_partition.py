import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tf_dist.parallel.context_partition import columns, own_chunks, seen

sizes = st.tuples(st.integers(1, 9), st.integers(1, 12))


@given(sizes)
def test_every_token_has_one_rank(size):
    s, each = size
    mine = [columns(s * each, rank, s) for rank in range(s)]
    assert all(len(one) == each and (np.diff(one) > 0).all() for one in mine)
    assert sorted(np.concatenate(mine)) == list(range(s * each))


def test_chunks_are_dealt_out_from_both_ends():
    assert [list(columns(8, rank, 4)) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert own_chunks(12, 0, 2) == (range(0, 3), range(9, 12))


@given(sizes)
def test_pairs_of_tokens_that_are_seen_are_those_before(size):
    """Every pair of a token and one before it, once; none of the future; and the same work for all ranks."""
    s, each = size
    T = s * each
    looked = np.zeros((T, T), int)
    for rank in range(s):
        mine = columns(T, rank, s)
        looked[np.ix_(mine, mine)] += np.tril(np.ones((each, each), int))
        for source in set(range(s)) - {rank}:
            queries, keys = seen(T, rank, source, s)
            found = np.ix_(mine[queries], columns(T, source, s)[keys])
            looked[found] += 1
            assert abs(looked[found].size - each * each / 2) <= each / 2  # half of all pairs
    np.testing.assert_array_equal(looked, np.tril(np.ones((T, T), int)))


def test_columns_of_one_rank_are_the_row():
    np.testing.assert_array_equal(columns(5, 0, 1), np.arange(5))
