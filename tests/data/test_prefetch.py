"""The next value is made in a thread while the last one is used, and is that of a plain call."""

import threading

import pytest

from tf_dist.data.prefetch import Prefetcher


def test_values_are_those_of_plain_calls_in_any_order():
    ahead = Prefetcher(lambda step: step * step)
    assert [ahead(step) for step in (0, 1, 2, 7, 8, 3, 3, 4)] == [0, 1, 4, 49, 64, 9, 9, 16]


def test_the_next_one_is_made_before_it_is_asked_for_and_by_another_thread():
    made, ready = {}, threading.Event()

    def make(step):
        made[step] = threading.current_thread()
        if step == 1:
            ready.set()
        return step

    ahead = Prefetcher(make)
    assert ahead(0) == 0
    assert ready.wait(10)
    assert made[0] is threading.main_thread() and made[1] is not made[0]
    before = made[1]
    assert ahead(1) == 1
    assert made[1] is before, "made once"


def test_an_error_comes_to_whoever_asks_for_its_step():
    def make(step):
        if step == 1:
            raise OSError("the disk is gone")
        return step

    ahead = Prefetcher(make)
    assert ahead(0) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        ahead(1)
    assert ahead(2) == 2
