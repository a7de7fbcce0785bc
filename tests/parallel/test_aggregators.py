"""Aggregators on ranks as threads: each sums, names are those of the list, an object has one optimizer."""

import numpy as np
import pytest
from thread_comm import ThreadComm, on_ranks

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError, UsageError
from tf_dist.parallel.aggregators import AGGREGATORS, MOST_WINDOWS, FixedOrder, PowerSGD, aggregator_of
from tf_dist.parallel.reduction_tree import one_each

SHAPES = [(6, 4), (4,)]
P = 28
EXACT = ["auto", "allreduce", "fixed-order"]


def gradient(rank, dtype=np.float32):
    return np.random.default_rng(rank).standard_normal(P).astype(dtype)


class Windowed(ThreadComm):
    """Terms of this rank belong into one place, which is that of the sum too."""

    def __init__(self, *given):
        super().__init__(*given)
        self.opened = set()

    def term_buffers(self, length, order):
        assert order == one_each(self.size)
        self.opened.add(length)
        self.place = np.zeros(length, np.float32)
        return lambda: [self.place]


@pytest.mark.parametrize("kind", [ThreadComm, Windowed])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", EXACT)
def test_whole_sums(name, dtype, kind):
    def work(comm):
        aggregator, own, out = aggregator_of(name), gradient(comm.rank, dtype), np.empty(P, dtype)
        aggregator.setup(SHAPES, comm)
        found = [aggregator.aggregate(own, comm, out).copy() for _ in range(2)]
        assert np.array_equal(own, gradient(comm.rank, dtype))  # only read
        found.append(aggregator.aggregate(own, comm, own).copy())
        return found

    expected = (gradient(0, dtype) + gradient(1, dtype)) + gradient(2, dtype)
    for seen in on_ranks(3, work, kind):
        assert all(np.array_equal(one, expected) for one in seen)


@pytest.mark.parametrize("name", ["auto", "fixed-order"])
def test_a_job_of_many_models_does_not_open_windows_without_end(name):
    def work(comm):
        for length in [5, 5, *range(10, 30)]:  # each of another optimizer
            aggregator = aggregator_of(name)
            aggregator.setup([(length,)], comm)
            ones = np.ones(length, np.float32)
            assert (aggregator.aggregate(ones, comm, ones) == 2).all()
        return len(comm.opened) == MOST_WINDOWS

    assert on_ranks(2, work, Windowed) == [True, True]


def test_a_window_that_was_wanted_must_be_there():
    outcomes = on_ranks(2, lambda comm: aggregator_of("window").setup(SHAPES, comm))
    assert all(isinstance(one, LaunchError) and "there is none" in str(one) for one in outcomes)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_one_rank_alone(name):
    aggregator, own = aggregator_of(name), gradient(0)
    aggregator.setup(SHAPES, SerialComm())
    found = aggregator.aggregate(own, SerialComm(), np.empty_like(own))
    if aggregator.exact:
        assert np.array_equal(found, own)
    else:
        np.testing.assert_allclose(found + aggregator.residual, own, atol=1e-5)


def test_names_and_objects():
    assert aggregator_of("window").facts() == {"carrier": "window"}
    mine = PowerSGD(rank=2)
    assert aggregator_of(mine) is mine
    mine.taken = True
    with pytest.raises(UsageError, match="make a new one for each"):
        aggregator_of(mine)
    with pytest.raises(UsageError, match=r"choose one of auto, allreduce.*Did you mean.*powersgd"):
        aggregator_of("powersdg")
    with pytest.raises(UsageError, match="or an object such as"):
        aggregator_of(4)
    with pytest.raises(UsageError, match="carrier is 'pigeon'"):
        FixedOrder(carrier="pigeon")
