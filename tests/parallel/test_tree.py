import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_dist.parallel import tree as tree_module
from tf_dist.parallel.tree import TreeSum

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
