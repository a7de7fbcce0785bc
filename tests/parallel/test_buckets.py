"""Buckets: every variable once, the last ones first; and the bits of a gradient that is added whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_dist.comm.transport.base import Overlapped, SerialComm
from tf_dist.data.sampler import share
from tf_dist.errors import LaunchError
from tf_dist.parallel.buckets import Buckets, choose, divide
from tf_dist.parallel.flat_buffer import FlatLayout
from tf_dist.parallel.reduction_tree import BlockSum, order


@given(st.lists(st.integers(0, 400), min_size=1, max_size=30), st.integers(1, 900), st.integers(1, 900))
def test_every_variable_is_in_one_bucket(sizes, most, last):
    buckets = divide(sizes, most, last)
    assert [variable for bucket in buckets[::-1] for variable in bucket] == list(range(len(sizes)))
    assert all(buckets)
    for bucket, limit in zip(buckets, [most] * (len(buckets) - 1) + [last], strict=True):
        assert len(bucket) == 1 or 4 * sum(sizes[variable] for variable in bucket) <= limit


class Noted(Overlapped):
    """An exchange that notes what it is given."""

    def __init__(self):
        self.parts = []

    def begin(self, terms):
        self.terms, self.parts = terms, []

    def ready(self, part):
        self.parts.append(part)

    def give_up(self):
        pass


@given(st.data())
def test_the_bits_of_a_gradient_added_whole(data):
    leaves, ranks = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    block = share(leaves, data.draw(st.integers(0, ranks - 1)), ranks)
    layout = FlatLayout(data.draw(st.lists(st.tuples(st.integers(0, 9)), min_size=1, max_size=6)))
    whole, parts = (BlockSum(layout.total, range(leaves), block) for _ in range(2))
    noted = Noted()
    buckets = Buckets(layout, parts, noted)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    for _ in range(3):  # buffers are used again
        for leaf in block:
            gradient = random.standard_normal(layout.total).astype(np.float32)
            whole.add(gradient)
            if leaf != block[-1]:
                parts.add(gradient)
                continue
            buckets.begin()
            for number, bucket in enumerate(buckets.divided):
                buckets.add(number, [layout.views(gradient)[variable] for variable in bucket])
        if not block:
            buckets.begin()
            buckets.add_empty()
        expected, found = whole.terms(), parts.terms()
        assert [term.tobytes() for term in found] == [term.tobytes() for term in expected]
        assert all(a is b for a, b in zip(found, noted.terms, strict=True))
        assert sorted(i for part in noted.parts for i in range(part.start, part.stop)) == list(
            range(layout.total)
        )


class Two(SerialComm):
    """As if there were another rank, on the same node."""

    size = 2


def chosen(wanted, why_not="", comm=None):
    layout = FlatLayout([(3,)])
    made = order(range(1), [range(1)])
    sums = BlockSum(3, range(1), range(1))
    return choose(comm or Two(), layout, made, sums, wanted, why_not)


def test_where_nothing_can_leave_early():
    assert chosen("auto") == (None, "")  # one node
    assert chosen("off") == chosen("on", comm=SerialComm()) == (None, "")
    with pytest.raises(LaunchError, match=r"because this backend cannot\. Use --overlap auto"):
        chosen("on")
    with pytest.raises(LaunchError, match="because of the weather"):
        chosen("on", "of the weather")
