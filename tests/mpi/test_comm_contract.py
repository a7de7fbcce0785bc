"""What every Comm promises, whatever carries the bytes. Expected values are formulas in rank and size.

Ranks gather what they found before they assert, so that all of them assert the same.
"""

import time

import numpy as np
import pytest

from tf_dist.comm.runtime.consensus import agree, on_root
from tf_dist.comm.transport.base import SerialComm
from tf_dist.data.sampler import share
from tf_dist.errors import DataError, LaunchError
from tf_dist.parallel.reduction_tree import BlockSum, TreeSum, order

pytestmark = pytest.mark.ranks(1, 3)

THREE_MB = 3 << 20  # more than a chunk of MPIComm, and, with a few elements more, no multiple of it
DTYPES = [np.float32, np.float64]


def lengths(dtype):
    return [1, 2, 1000, THREE_MB // np.dtype(dtype).itemsize + 13]


def ramp(length, dtype):
    """0, 1 .. 96, 0, 1 ...: small whole numbers, whose sums are exact."""
    return (np.arange(length) % 97).astype(dtype)


@pytest.fixture
def found(everyone):
    """``found(wrong)``: assert that no rank of the job found anything wrong."""

    def check(wrong):
        assert everyone(wrong) == [[]] * len(everyone(None))

    return check


def test_rank_and_size(comm, everyone):
    seen = everyone((comm.rank, comm.size))
    size = 1 if isinstance(comm, SerialComm) else len(seen)
    assert seen == [(rank % size, size) for rank in range(len(seen))]


# Arrays --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_allreduce_sums_in_place(comm, found, dtype):
    wrong = []
    for length in lengths(dtype):
        array = ramp(length, dtype) * (comm.rank + 1)
        result = comm.allreduce(array)
        expected = ramp(length, dtype) * (comm.size * (comm.size + 1) / 2)
        if result is not None or array.dtype != dtype or not np.array_equal(array, expected):
            wrong.append((length, array[:5], expected[:5]))
    found(wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_allreduce_gives_the_same_bits_everywhere(comm, everyone, dtype):
    """Weights stay equal because of this, not because sums are exact: these are not."""
    array = np.random.default_rng(comm.rank).standard_normal(100_003).astype(dtype)
    terms = [np.random.default_rng(rank).standard_normal(100_003).astype(dtype) for rank in range(comm.size)]
    comm.allreduce(array)
    np.testing.assert_allclose(array, np.sum(terms, axis=0), rtol=0, atol=1e-5)
    assert len(set(everyone(array.tobytes()))) == 1


def test_allreduce_of_a_part_of_an_array(comm, found):
    """A view is changed, and what lies around it is not."""
    array = np.full(30, float(comm.rank))
    comm.allreduce(array[10:20])
    expected = np.full(30, float(comm.rank))
    expected[10:20] = comm.size * (comm.size - 1) / 2
    found([] if np.array_equal(array, expected) else [array])


@pytest.mark.parametrize("dtype", [*DTYPES, np.int64])
def test_broadcast_from_each_root(comm, found, dtype):
    wrong = []
    for root in range(comm.size):
        for length in lengths(dtype):
            array = ramp(length, dtype) + comm.rank
            result = comm.broadcast(array, root)
            if result is not None or not np.array_equal(array, ramp(length, dtype) + root):
                wrong.append((root, length, array[:5]))
    found(wrong)


def test_broadcast_is_from_rank_0_unless_told(comm, found):
    array = np.array([comm.rank + 5.0])
    comm.broadcast(array)
    found([] if array[0] == 5 else [array])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_to_each_root(comm, found, dtype):
    wrong = []
    for root in range(comm.size):
        for length in lengths(dtype):
            mine = ramp(length, dtype) + comm.rank
            rows = comm.gather(mine, root)
            if comm.rank != root:
                right = rows is None
            else:
                expected = np.stack([ramp(length, dtype) + rank for rank in range(comm.size)])
                right = rows.dtype == dtype and np.array_equal(rows, expected)
            if not right or not np.array_equal(mine, ramp(length, dtype) + comm.rank):
                wrong.append((root, length, rows))
    found(wrong)


@pytest.mark.parametrize("leaves", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("length", [1, 17, 100_003, THREE_MB // 4 + 13])
def test_terms_are_added_in_the_order_of_one_rank(comm, found, leaves, length):
    """Whoever has them: the bits are those of the whole tree. Horovod's are its own, the same everywhere."""
    arrays = [
        np.random.default_rng(leaf).standard_normal(length).astype(np.float32) for leaf in range(leaves)
    ]
    whole = TreeSum(length)
    for array in arrays:
        whole.add(array)
    blocks = [share(leaves, rank, comm.size) for rank in range(comm.size)]
    made, expected, wrong = order(range(leaves), blocks), whole.result(), []
    for verb in ("allreduce_terms", "reduce_terms"):
        mine = BlockSum(length, range(leaves), blocks[comm.rank])
        for leaf in blocks[comm.rank]:
            mine.add(arrays[leaf])
        out = np.full(length, -1.0, np.float32)
        getattr(comm, verb)(mine.terms(), made, out)
        if verb == "reduce_terms" and comm.rank:
            right = bool((out == -1).all())
        elif type(comm).__name__ == "HorovodComm":
            right = np.allclose(out, expected, rtol=0, atol=1e-5)
        else:
            right = out.tobytes() == expected.tobytes()
        if not right:
            wrong.append((verb, out[:3], expected[:3]))
    found(wrong)


def test_terms_go_to_any_root_and_into_a_term(comm, found):
    """The sum may lie over the first term, as the updates ask; and terms of the last step do not linger."""
    wrong = []
    for root in range(comm.size):
        for factor in (1.0, 2.0):
            blocks = [range(rank, rank + 1) for rank in range(comm.size)]
            term = ramp(1000, np.float32) * np.float32(factor * (comm.rank + 1))
            comm.reduce_terms([term], order(range(comm.size), blocks), term, root)
            expected = ramp(1000, np.float32) * np.float32(factor * comm.size * (comm.size + 1) / 2)
            if comm.rank == root and not np.array_equal(term, expected):
                wrong.append((root, factor, term[:5]))
    found(wrong)


@pytest.mark.parametrize("verb", ["allreduce", "broadcast", "gather"])
@pytest.mark.parametrize(
    "bad", [np.zeros((2, 2)), np.zeros(()), np.zeros(10)[::2]], ids=["2-D", "0-D", "gaps"]
)
def test_other_shapes_are_refused(comm, found, verb, bad):
    """On every rank, before anything is sent: the next collective works."""
    wrong = []
    try:
        getattr(comm, verb)(bad)
        wrong.append("accepted")
    except ValueError as error:
        if "contiguous 1-D array" not in str(error):
            wrong.append(str(error))
    array = np.ones(3)
    comm.allreduce(array)
    if not np.array_equal(array, np.full(3, comm.size)):
        wrong.append(array)
    found(wrong)


# Objects -------------------------------------------------------------------------------------------


def value_of(rank):
    """Of another size on every rank; on rank 0 the smallest that there is."""
    return (
        "" if rank == 0 else {"rank": rank, "words": ["grüße"] * (1000 * rank), "none": None, "x": 0.1 * rank}
    )


def test_allgather_obj(comm, found):
    values = comm.allgather_obj(value_of(comm.rank))
    found([] if values == [value_of(rank) for rank in range(comm.size)] else [values])


def test_broadcast_obj_from_each_root(comm, found):
    wrong = []
    for root in range(comm.size):
        value = comm.broadcast_obj(value_of(comm.rank), root)
        if value != value_of(root):
            wrong.append((root, value))
    found(wrong)


def test_objects_are_json(comm, found):
    """No pickle: what JSON cannot say is refused, on every rank, and the ranks still talk."""
    wrong = []
    try:
        comm.allgather_obj({1, 2})
        wrong.append("accepted")
    except TypeError:
        pass
    if comm.allgather_obj(comm.rank) != list(range(comm.size)):
        wrong.append("lost")
    found(wrong)


# Clocks --------------------------------------------------------------------------------------------


def test_barrier_waits_for_the_slowest(comm, everyone):
    """The others' time goes to wait_s and to nothing else."""
    comm.barrier()
    waited, moved = comm.wait_s, comm.comm_s
    if comm.rank == comm.size - 1:
        time.sleep(0.4)
    comm.barrier()
    found = everyone((comm.wait_s - waited, comm.comm_s - moved))
    assert [moved_s for _, moved_s in found] == [0] * len(found)
    if comm.size > 1:
        *others, slowest_s = [waited_s for waited_s, _ in found]
        assert min(others) > slowest_s


def test_calls_are_counted_and_left(comm, everyone):
    calls, moved = comm.calls, comm.comm_s
    comm.allreduce(np.ones(1000))
    comm.broadcast(np.ones(1000))
    comm.gather(np.ones(1000))
    comm.allgather_obj(1)
    comm.barrier()
    assert everyone((comm.calls - calls, comm.waiting)) == [(5, None)] * len(everyone(None))
    assert all(everyone(comm.comm_s > moved))


def test_nobody_has_died(comm, everyone):
    before = comm.rank, comm.size, comm.calls
    assert everyone(comm.regroup()) == [None] * len(everyone(None))
    assert not comm.survives and (comm.rank, comm.size, comm.calls) == before


def test_calls_of_all(comm, everyone):
    """Each rank's own number, itself not counted, and counted afterwards."""
    before = comm.calls
    comm.calls += 1000 * comm.rank
    try:
        found = comm.calls_of_all()
    finally:
        comm.calls -= 1000 * comm.rank
    expected = [before + 1000 * rank for rank in range(comm.size)]
    assert everyone((found, comm.calls)) == [(expected, before + 1)] * len(everyone(None))


def test_collectives_of_two_comms_do_not_meet(comm, everyone):
    """Our messages never meet those of a user's own communicator, here that of the tests."""
    array = np.full(10, 1.0)
    before = everyone("before")
    comm.allreduce(array)
    assert everyone(float(array[0])) == [float(comm.size)] * len(before)


# What is built on them -----------------------------------------------------------------------------


def test_agree(comm, found):
    agree(comm, {"seed": 1, "data": "a"}, "the run")
    wrong = []
    try:
        agree(comm, {"seed": comm.rank // 2, "data": "a"}, "the run")
        wrong += ["accepted"] * (comm.size > 2)
    except LaunchError as error:
        text = str(error)
        first, second = "0 on ranks 0 1", "1 on rank 2" if comm.size == 3 else "1 on ranks 2 3"
        if comm.size <= 2 or f"seed: {first}, {second}" not in text or "data" in text.split("\n", 1)[1]:
            wrong.append(text)
    found(wrong)


def test_agree_on_a_fact_that_one_rank_lacks(comm, found):
    facts = {"keras": "3.15"} if comm.rank == comm.size - 1 else {}
    wrong = []
    try:
        agree(comm, facts, "the versions")
        wrong += ["accepted"] * (comm.size > 1)
    except LaunchError as error:
        if f"3.15 on rank {comm.size - 1}" not in str(error) or "nothing on rank" not in str(error):
            wrong.append(str(error))
    found(wrong)


def test_on_root(comm, everyone):
    called = []

    def function():
        called.append(comm.rank)
        return {"path": "a", "by": comm.rank}

    value = on_root(comm, function)
    assert everyone(value) == [{"path": "a", "by": 0}] * len(everyone(None))
    assert everyone(called) == everyone([0] if comm.rank == 0 else [])


def test_on_root_fails_everywhere(comm, everyone):
    def function():
        raise DataError("no text there")

    try:
        on_root(comm, function)
        outcome = "nothing"
    except DataError as error:
        outcome = str(error)
    assert everyone(outcome) == ["no text there"] * len(everyone(None))
