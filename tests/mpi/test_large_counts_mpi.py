"""Arrays of more elements than MPI can count: as if it could count seven."""

from itertools import pairwise

import numpy as np
import pytest

from tf_dist.comm.transport import large_counts
from tf_dist.comm.transport.mpi import MPIComm
from tf_dist.comm.transport.reduction_order import ReductionOrder
from tf_dist.parallel.reduction_tree import one_each

pytestmark = pytest.mark.ranks(2)

LENGTH = 40


@pytest.fixture
def comm(connected, monkeypatch):
    """By messages, for windows count nothing."""
    monkeypatch.setattr(large_counts, "MOST", 7)
    return MPIComm(window=False)


def parts_of(size):
    """One rank has most, and the last one nothing."""
    ends = [0, LENGTH - size + 2, *range(LENGTH - size + 3, LENGTH + 1), LENGTH] if size > 1 else [0, LENGTH]
    return [slice(*pair) for pair in pairwise(ends)][:size]


def test_parts_are_counted(monkeypatch):
    monkeypatch.setattr(large_counts, "MOST", 7)
    assert [part.size for part in large_counts.counted(np.zeros(15))] == [7, 7, 1]
    assert [part.size for part in large_counts.counted(np.zeros(0))] == [0]
    assert large_counts.slices_of([slice(0, 9), slice(9, 11), slice(11, 11)]) == [
        [slice(0, 7), slice(9, 11), slice(11, 11)],
        [slice(7, 9), slice(11, 11), slice(11, 11)],
    ]


def test_allgather_and_objects(comm, everyone):
    parts = parts_of(comm.size)
    assert parts[-1].stop == LENGTH
    array = np.full(LENGTH, -1.0, np.float32)
    mine = parts[comm.rank]
    array[mine] = np.arange(mine.start, mine.stop)
    comm.allgather(array, parts)
    values = comm.allgather_obj({"rank": comm.rank, "text": "x" * 30})
    assert everyone(array.tolist()) == [list(range(LENGTH))] * comm.size
    assert everyone([one["rank"] for one in values]) == [list(range(comm.size))] * comm.size


def test_gather(comm, everyone):
    rows = comm.gather(np.arange(LENGTH) + 100.0 * comm.rank)
    found = everyone(None if rows is None else rows.tolist())
    assert found[0] == [[i + 100.0 * rank for i in range(LENGTH)] for rank in range(comm.size)]


def test_messages_between_two_ranks(comm, everyone):
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    came, more = np.zeros(LENGTH), np.zeros(3)
    waits = [comm.irecv(came, source), comm.irecv(more, source)]
    waits += [comm.isend(np.arange(LENGTH) + float(comm.rank), to), comm.isend(np.ones(3) * comm.rank, to)]
    for one in waits:
        one.wait()
    done = all(one.done() for one in waits)
    expected = [[done, source, LENGTH - 1 + source, source] for source in np.roll(range(comm.size), 1)]
    assert everyone([done, came[0], came[-1], more[-1]]) == expected
    assert all(everyone(done))


def test_sums_of_terms(comm, everyone):
    order: ReductionOrder = one_each(comm.size)
    ramp, total = np.arange(LENGTH, dtype=np.float32), sum(range(1, comm.size + 1))
    wrong = []
    out = np.zeros(LENGTH, np.float32)
    comm.chunk_bytes = 1 << 40  # more than can be counted at once
    comm.allreduce_terms([ramp * (comm.rank + 1)], order, out)
    wrong += ["allreduce_terms"] * (not np.array_equal(out, ramp * total))
    out = np.zeros(LENGTH, np.float32)
    comm.reduce_terms([ramp * (comm.rank + 1)], order, out)
    wrong += ["reduce_terms"] * (comm.rank == 0 and not np.array_equal(out, ramp * total))
    parts = parts_of(comm.size)
    mine = parts[comm.rank]
    out = np.zeros(mine.stop - mine.start, np.float32)
    comm.reduce_scatter_terms([ramp * (comm.rank + 1)], order, parts, out)
    wrong += ["reduce_scatter_terms"] * (not np.array_equal(out, ramp[mine] * total))
    assert everyone(wrong) == [[]] * comm.size
