"""What a master deals out: every unit once, in order, never further ahead than the bound."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_dist.parallel.dealing import Dealer, Unit, micro_batches_of_a_unit
from tf_dist.parallel.tree import order, subtrees


@given(st.integers(1, 200), st.integers(1, 9))
def test_units_are_subtrees_and_theirs_is_the_top_of_the_tree(micro_batches, workers):
    size = micro_batches_of_a_unit(micro_batches, workers)
    count, leaves = micro_batches // size, range(micro_batches)
    assert count * size == micro_batches
    assert count >= workers or size == 1
    blocks = [range(i * size, (i + 1) * size) for i in range(count)]
    assert all(subtrees(leaves, block) == [block] for block in blocks)
    one_each = [range(i, i + 1) for i in range(count)]
    assert order(leaves, blocks) == order(range(count), one_each)


@given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 6), st.randoms(use_true_random=False))
def test_every_unit_once_and_nobody_too_far_ahead(units, staleness, limit, random):
    dealer, out, dealt, returned = Dealer(units, staleness), [], [], []
    while dealer.done < limit:
        unit = dealer.deal(limit) if random.random() < 0.6 else None
        if unit is not None:
            assert unit.step - dealer.done <= staleness
            out.append(unit)
            if unit in returned:  # by whoever has died
                assert returned.pop(0) == unit
            else:
                assert not returned
                dealt.append(unit)
        elif out and random.random() > 0.8:
            returned.append(out.pop(random.randrange(len(out))))
            dealer.give_back(returned[-1])
        elif out:
            before = dealer.done
            dealer.finish(out.pop(random.randrange(len(out))))
            assert dealer.done in range(before, limit + 1)
            assert all(unit.step >= dealer.done for unit in out)
    assert dealt == [Unit(step, number) for step in range(limit) for number in range(units)]
    assert dealer.deal(limit) is None and not out
    assert dealer.deal(limit + 1) == Unit(limit, 0)


def test_with_no_staleness_a_batch_waits_for_the_one_before():
    dealer = Dealer(2, 0, first=5)
    first, second = dealer.deal(9), dealer.deal(9)
    assert (first, second) == (Unit(5, 0), Unit(5, 1))
    assert dealer.deal(9) is None and dealer.begun == 6
    dealer.finish(second)
    assert dealer.deal(9) is None
    dealer.finish(first)
    assert dealer.done == 6 and dealer.deal(9) == Unit(6, 0)


def test_a_unit_cannot_be_done_twice():
    dealer = Dealer(2, 1)
    unit = dealer.deal(1)
    dealer.finish(unit)
    with pytest.raises(KeyError):
        dealer.finish(unit)
