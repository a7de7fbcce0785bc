"""The consistency check and the probe, ranks as threads: who is named, who is restored, what is refused."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
import thread_comm
from thread_comm import ThreadComm

from tf_dist.comm.runtime.backend_self_test import prove
from tf_dist.comm.transport.base import SerialComm
from tf_dist.comm.transport.reduction_order import Reduced
from tf_dist.errors import LaunchError, UsageError
from tf_dist.training.consistency_check import ConsistencyCheck, ReplicaGroup


def on_ranks(size, function, kind=ThreadComm):
    """What ``function(comm)`` returns on each of ``size`` ranks, or the text of what it raises."""
    outcomes = thread_comm.on_ranks(size, function, kind)
    return [str(outcome) if isinstance(outcome, LaunchError) else outcome for outcome in outcomes]


class Value:
    """What the consistency check needs of a variable."""

    def __init__(self, array):
        self.value = array

    def assign(self, array):
        self.value = np.array(array)


def three_variables():
    return [
        ("dense/kernel", Value(np.arange(12, dtype=np.float32).reshape(3, 4))),
        ("dense/bias", Value(np.zeros(4, np.float32))),
        ("adam/iteration", Value(np.array(7, np.int64))),
    ]


def flip(array, place, bit):
    array.reshape(-1).view(np.uint8)[place] ^= 1 << bit


@pytest.mark.parametrize("place", [0, 47])
@pytest.mark.parametrize("bit", [0, 7])
def test_any_flipped_bit_is_seen(place, bit):
    def work(comm):
        variables = three_variables()
        if comm.rank == 1:
            flip(variables[0][1].value, place, bit)
        ConsistencyCheck(comm, [ReplicaGroup(comm, variables)]).compare(5)

    said = on_ranks(3, work)
    assert len(set(said)) == 1
    assert "before step 6" in said[0]
    assert "rank 1 differs from ranks 0, 2 in dense/kernel." in said[0]


def test_the_first_variable_that_differs_is_named():
    def work(comm):
        variables = three_variables()
        if comm.rank == 0:
            variables[1][1].assign(np.ones(4, np.float32))
            variables[2][1].assign(np.array(8))
        ConsistencyCheck(comm, [ReplicaGroup(comm, variables)]).compare(0)

    assert (
        "rank 0 differs from ranks 1, 2, 3 in dense/bias (and 1 more of 3 variables)" in on_ranks(4, work)[2]
    )


@pytest.mark.parametrize("size", [2, 4])
def test_without_a_majority_nobody_is_blamed_and_nothing_is_restored(size):
    def work(comm):
        variables = three_variables()
        variables[0][1].value[0, 0] = comm.rank // (size // 2)
        ConsistencyCheck(comm, [ReplicaGroup(comm, variables)], on_mismatch="restore").compare(1)

    said = on_ranks(size, work)[0]
    both = "rank 0 and rank 1 differ" if size == 2 else "ranks 0, 1 and ranks 2, 3 differ"
    assert both in said
    assert "Nothing was restored" in said


@pytest.mark.parametrize("size", [3, 4])
def test_two_ranks_wrong_in_different_variables_are_both_restored(size, told):
    """The vote is about each variable, so even where no two ranks are equal all is put right."""

    def work(comm):
        variables = three_variables()
        if comm.rank < 2:
            variables[comm.rank][1].value[...] = -1
        check = ConsistencyCheck(comm, [ReplicaGroup(comm, variables)], on_mismatch="restore")
        check.compare(1)
        return [variable.value.tobytes() for _, variable in variables]

    right = [variable.value.tobytes() for _, variable in three_variables()]
    assert on_ranks(size, work) == [right] * size
    lines = told.messages
    assert len(lines) == size
    assert all("rank 0 differs" in text and text.endswith("Restored from the others") for text in lines)


def test_one_collective_more_is_named():
    def work(comm):
        comm.calls += comm.rank == 2
        ConsistencyCheck(comm, [ReplicaGroup(comm, three_variables())]).compare(3)

    said = on_ranks(3, work)
    assert len(set(said)) == 1
    assert "0 on ranks 0, 1, 1 on rank 2. Rank 2 left one out or called one more" in said[0]


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [0, 1, 2, 3]), (1, list(range(12))), (5, [0, 1, 2, 3, 5, 10])]
)
def test_when_it_looks(every, expected):
    check, looked = ConsistencyCheck(SerialComm(), [], every), []
    check.compare = looked.append
    for step in range(12):
        check.watch(step)
    assert looked == expected


def test_a_resumed_run_is_compared_in_its_first_steps():
    check, looked = ConsistencyCheck(SerialComm(), [], 100), []
    check.compare = looked.append
    for step in range(250, 310):
        check.watch(step)
    assert looked == [250, 251, 252, 253, 300]


@pytest.mark.parametrize(("every", "on_mismatch"), [(-1, "stop"), (1, "ignore")])
def test_what_is_refused(every, on_mismatch):
    with pytest.raises(UsageError):
        ConsistencyCheck(SerialComm(), [], every, on_mismatch)


@pytest.mark.parametrize("update", ["allreduce", "master"])
def test_what_a_trainer_compares(update):
    """With a master only rank 0 has an optimizer: nobody could tell whether it is right."""
    from tf_dist.training.trainer import Trainer

    model = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(5, 5)])
    trainer = Trainer(
        model, keras.optimizers.Adam(), SerialComm(), update, clip_norm=0.0, global_batch_size=2
    )
    watched = [id(variable) for _, variable in trainer.consistency_check.groups[0].variables]
    expected = [*model.weights, *(trainer.optimizer.variables if update == "allreduce" else [])]
    assert watched == [id(variable) for variable in expected]


# The probe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_that_talk_are_proven(size):
    assert on_ranks(size, prove) == [None] * size


class NoReduction(ThreadComm):
    """As Horovod's optimizer under Keras 3: nothing happens, and nothing is said."""

    def _allreduce(self, array):
        pass


class OneLeftOut(ThreadComm):
    def _allreduce(self, array):
        array[:] = sum(self._everyone(array.copy())[:-1])


class Mean(ThreadComm):
    def _allreduce(self, array):
        array[:] = sum(self._everyone(array.copy())) / self.size


class NoBroadcast(ThreadComm):
    def _broadcast(self, array, root):
        pass


class GatherOfOne(ThreadComm):
    def _gather(self, array, root):
        return np.stack([array] * self.size) if self.rank == root else None


@pytest.mark.parametrize(
    ("kind", "verb"),
    [
        (NoReduction, "allreduce of float32 returned 1, not 14"),
        (OneLeftOut, "allreduce of float32 returned 5, not 14"),
        (Mean, "allreduce of float32"),
        (NoBroadcast, "broadcast from rank"),
        (GatherOfOne, "gather returned 0, not 1"),
    ],
)
def test_a_backend_that_does_not_do_its_work_is_named(kind, verb):
    said = on_ranks(3, prove, kind)
    assert len(set(said)) == 1
    assert f"{kind.__name__} was tried on 3 ranks" in said[0]
    assert verb in said[0]


def test_ranks_that_are_alone_without_knowing():
    """Every rank its own world: the values of the others never come."""
    alone = SerialComm()
    alone.size = 2
    alone._allreduce_terms = lambda terms, order, out: Reduced(out)
    with pytest.raises(LaunchError, match="on rank 0 allreduce of float32 returned 1, not 5; "):
        prove(alone)


def test_fit_proves_before_it_trains():
    from tf_dist.training.trainer import Trainer

    model = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(5, 5)])
    trainer = Trainer(model, keras.optimizers.SGD(), SerialComm(), clip_norm=0.0, global_batch_size=2)
    trainer.comm = SimpleNamespace(rank=0, size=2, allreduce=lambda array: None,
                                   allreduce_terms=lambda terms, order, out: None,
                                   broadcast=lambda array, root=0: None, gather=lambda array: array,
                                   allgather_obj=lambda value: [value, value])  # fmt: skip
    with pytest.raises(LaunchError, match="the ranks do not talk"):
        trainer.fit(np.zeros(100, np.int32), steps=1)
    assert trainer.step == 0
