"""What a master deals out: every unit once, in order, never further ahead than the bound."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_dist.parallel.reduction_tree import order, subtrees
from tf_dist.parallel.work_queue import WorkItem, WorkQueue, micro_batches_of_an_item


@given(st.integers(1, 200), st.integers(1, 9))
def test_units_are_subtrees_and_theirs_is_the_top_of_the_tree(micro_batches, workers):
    size = micro_batches_of_an_item(micro_batches, workers)
    count, leaves = micro_batches // size, range(micro_batches)
    assert count * size == micro_batches
    assert count >= workers or size == 1
    blocks = [range(i * size, (i + 1) * size) for i in range(count)]
    assert all(subtrees(leaves, block) == [block] for block in blocks)
    one_each = [range(i, i + 1) for i in range(count)]
    assert order(leaves, blocks) == order(range(count), one_each)


@given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 6), st.randoms(use_true_random=False))
def test_every_unit_once_and_nobody_too_far_ahead(units, staleness, limit, random):
    dealer, out, dealt, returned = WorkQueue(units, staleness), [], [], []
    while dealer.done < limit:
        unit = dealer.next_item(limit) if random.random() < 0.6 else None
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
    assert dealt == [WorkItem(step, number) for step in range(limit) for number in range(units)]
    assert dealer.next_item(limit) is None and not out
    assert dealer.next_item(limit + 1) == WorkItem(limit, 0)


def test_with_no_staleness_a_batch_waits_for_the_one_before():
    dealer = WorkQueue(2, 0, first=5)
    first, second = dealer.next_item(9), dealer.next_item(9)
    assert (first, second) == (WorkItem(5, 0), WorkItem(5, 1))
    assert dealer.next_item(9) is None and dealer.begun == 6
    dealer.finish(second)
    assert dealer.next_item(9) is None
    dealer.finish(first)
    assert dealer.done == 6 and dealer.next_item(9) == WorkItem(6, 0)


def test_a_unit_cannot_be_done_twice():
    dealer = WorkQueue(2, 1)
    unit = dealer.next_item(1)
    dealer.finish(unit)
    with pytest.raises(KeyError):
        dealer.finish(unit)
