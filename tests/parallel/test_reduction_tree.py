import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_dist.comm.transport.reduction_order import add_in_order
from tf_dist.parallel import reduction_tree as tree_module
from tf_dist.parallel.reduction_tree import BlockSum, TreeSum, order, subtrees

LENGTH = 5


def arrays(count, seed=0):
    """Arrays whose sums depend on the order of addition: magnitudes from 1e-6 to 1e6."""
    random = np.random.default_rng(seed)
    scales = 10.0 ** random.integers(-6, 7, (count, LENGTH))
    return list((random.standard_normal((count, LENGTH)) * scales).astype(np.float32))


def pairwise(terms):
    """The definition: the largest power of two of terms on the left, the rest on the right."""
    if len(terms) == 1:
        return terms[0]
    left = 1 << ((len(terms) - 1).bit_length() - 1)
    return pairwise(terms[:left]) + pairwise(terms[left:])


def tree_sum(terms, tree=None):
    tree = tree or TreeSum(LENGTH)
    for term in terms:
        tree.add(term)
    return tree.result().copy()


def bits(array):
    return array.view(np.uint32).tolist()


@given(st.integers(1, 70), st.integers(0, 2**32))
def test_it_is_the_recursive_tree(count, seed):
    terms = arrays(count, seed)
    assert bits(tree_sum(terms)) == bits(pairwise(terms))


def test_the_order_matters_in_these_tests():
    terms = arrays(64)
    assert bits(tree_sum(terms)) != bits(sum(terms[1:], terms[0]))


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**32))
def test_ranks_that_are_powers_of_two_add_up_to_the_whole(log_ranks, log_each, seed):
    ranks, each = 1 << log_ranks, 1 << log_each
    terms = arrays(ranks * each, seed)
    shares = [tree_sum(terms[rank * each :][:each]) for rank in range(ranks)]
    assert bits(tree_sum(shares)) == bits(tree_sum(terms))
    if ranks == 2:
        assert bits(shares[0] + shares[1]) == bits(tree_sum(terms))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_each_result_begins_anew(counts):
    tree = TreeSum(LENGTH)
    for seed, count in enumerate(counts):
        terms = arrays(count, seed)
        expected = pairwise(terms) if terms else np.zeros(LENGTH, np.float32)
        assert bits(tree_sum(terms, tree)) == bits(expected)


def test_what_is_added_is_read_and_not_kept():
    tree, terms = TreeSum(LENGTH), arrays(7)
    buffer = np.empty(LENGTH, np.float32)
    for term in terms:
        buffer[:] = term
        tree.add(buffer)
        assert bits(buffer) == bits(term)
    buffer[:] = np.nan
    assert bits(tree.result()) == bits(pairwise(terms))


def test_read_only_arrays_can_be_added():
    terms = arrays(4)
    for term in terms:
        term.setflags(write=False)
    assert bits(tree_sum(terms)) == bits(pairwise(terms))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 100])
def test_memory_is_logarithmic_and_kept_for_the_next_sum(monkeypatch, count):
    taken = []
    make = tree_module.aligned_empty
    monkeypatch.setattr(tree_module, "aligned_empty", lambda length: taken.append(length) or make(length))
    tree = TreeSum(LENGTH)
    tree_sum(arrays(count), tree)
    needed = len(taken)
    assert needed <= np.log2(count) + 1
    for seed in range(3):
        tree_sum(arrays(count, seed), tree)
    assert len(taken) == needed


def test_nothing_is_zeros_again_and_again():
    tree = TreeSum(LENGTH)
    assert bits(tree.result()) == [0] * LENGTH
    tree_sum(arrays(3), tree)
    assert bits(tree.result()) == [0] * LENGTH


def test_a_result_is_aligned_for_tensorflow():
    tree = TreeSum(LENGTH)
    tree.add(arrays(1)[0])
    assert tree.result().ctypes.data % 64 == 0


# Across ranks -------------------------------------------------------------------------------------


@st.composite
def blocks_of(draw):
    """Blocks of neighbouring leaves for some ranks, uneven, and some of them empty."""
    leaves = draw(st.integers(1, 40))
    cuts = sorted(draw(st.lists(st.integers(0, leaves), min_size=0, max_size=7)))
    return [range(*cut) for cut in zip([0, *cuts], [*cuts, leaves], strict=True)]


@given(blocks_of(), st.integers(0, 2**32))
def test_any_ranks_make_the_additions_of_one(blocks, seed):
    leaves = range(sum(map(len, blocks)))
    terms_of_leaves = arrays(len(leaves), seed)
    terms = []
    for block in blocks:
        mine = BlockSum(LENGTH, leaves, block)
        for leaf in block:
            mine.add(terms_of_leaves[leaf])
        terms.append([term.copy() for term in mine.terms()])
    made = order(leaves, blocks)
    assert made.counts == tuple(map(len, terms))
    everyone = [term for theirs in terms for term in theirs]
    assert len(made.additions) == len(everyone) - 1
    assert bits(add_in_order(everyone, made.additions)) == bits(pairwise(terms_of_leaves))


@given(blocks_of())
def test_subtrees_are_the_block_and_few(blocks):
    leaves = range(sum(map(len, blocks)))
    for block in blocks:
        found = subtrees(leaves, block)
        assert [leaf for term in found for leaf in term] == list(block)
        assert len(found) <= 2 * max(1, np.ceil(np.log2(len(leaves))))


@pytest.mark.parametrize(
    ("leaves", "ranks", "expected"),
    [
        (8, 2, [["0123"], ["4567"]]),
        (8, 3, [["01", "2"], ["3", "45"], ["67"]]),
        (6, 3, [["01"], ["23"], ["45"]]),
        (7, 2, [["0123"], ["456"]]),  # the right side, smaller than the left, is a subtree as well
        (2, 4, [["0"], ["1"], [], []]),
    ],
)
def test_who_has_which_subtrees(leaves, ranks, expected):
    whole = range(leaves)
    per_rank = [[] for _ in range(ranks)]
    start = 0
    for rank in range(ranks):
        length = leaves // ranks + (rank < leaves % ranks)
        for term in subtrees(whole, range(start, start + length)):
            per_rank[rank].append("".join(map(str, term)))
        start += length
    assert per_rank == expected


def test_a_block_that_lacks_a_leaf_is_our_mistake():
    mine = BlockSum(LENGTH, range(4), range(2, 4))
    mine.add(arrays(1)[0])
    with pytest.raises(AssertionError, match="a leaf of the block is missing"):
        mine.terms()
