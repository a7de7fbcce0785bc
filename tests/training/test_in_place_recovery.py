"""Phases in spite of deaths, on one of several ranks; what the others say is written down beforehand."""

from types import SimpleNamespace

import numpy as np
import pytest

from tf_dist.errors import RankLost
from tf_dist.training.in_place_recovery import MOST_ATTEMPTS, InPlaceRecovery
from tf_dist.training.restart import AGAIN, RestartInProcess
from tf_dist.training.train_state import SkippedSteps, TrainState


class Ranks:
    """The Comm of rank 0. agreed: what `regroup` returns, in turn. said: what other ranks say, in turn."""

    survives, rank, size = True, 0, 2

    def __init__(self, agreed=(), said=(), given=()):
        self.agreed, self.said, self.given, self.fine = list(agreed), list(said), list(given), []

    def regroup(self, fine=True, at=""):
        self.fine.append(fine)
        return self.agreed.pop(0)

    def allgather_obj(self, value, what=""):
        others = self.said.pop(0)
        if isinstance(others, Exception):
            raise others
        return [value, *others]

    def broadcast_obj(self, value, root):
        return self.said.pop(0) if root else value

    def broadcast(self, array, root):
        if root:
            array[:] = self.given.pop(0).view(np.uint8)


def training(weight):
    """What `InPlaceRecovery` sees of a training; ``weight`` is all there is of weights."""
    piece = SimpleNamespace(read=lambda: weight, write=lambda values: np.copyto(weight, values))
    entry = SimpleNamespace(shape=weight.shape, dtype="float32", pieces=[piece])
    state = TrainState(step=4, tokens=40, skipped=SkippedSteps(1, 0))
    made = SimpleNamespace(state=state, whole=lambda: SimpleNamespace(entries=[entry]), shared=0, all=True)

    def redistribute():
        made.shared += 1

    made.redistribute = redistribute
    return made


def in_place_of(comm, it, min_ranks=1):
    return InPlaceRecovery(it.state, comm, it.whole, it.redistribute, it.all, min_ranks)


def failing(*outcomes):
    """A phase with these outcomes, one after another; `RankLost` is raised."""
    left = list(outcomes)

    def do():
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return do


LOST = RankLost("rank 2 has died", [2])


@pytest.fixture
def weight():
    return np.array([1.0, 2.0], np.float32)


def test_nothing_is_asked_while_nobody_dies(weight):
    comm = Ranks()
    assert in_place_of(comm, training(weight))(failing(7)) == 7 and comm.fine == []


def test_a_phase_is_begun_again_together(weight, told):
    comm = Ranks(agreed=[[2], None], said=[[0]])
    it = training(weight)
    in_place = in_place_of(comm, it)
    assert in_place(failing(LOST, 7)) == 7
    assert comm.fine == [False, True] and it.shared == 1 and it.state.lost == [2]
    assert [(one.lost, one.step) for one in in_place.recoveries] == [([2], 4)]
    assert "rank 2 died in step 5: 2 ranks go on after" in told.messages[-1]


def test_who_is_behind_takes_over_all_that_a_step_has_changed(weight):
    given = np.array([3.0, 4.0], np.float32)
    comm = Ranks(agreed=[[2], None], said=[[1], [5], ["logs", True, [5, 50, 3, 2]]], given=[given])
    it = training(weight)
    assert in_place_of(comm, it)(failing(LOST)) == "logs"
    assert (it.state.counters, it.state.stopped) == ([5, 50, 3, 2], True)
    assert weight.tolist() == [3.0, 4.0]


def test_who_is_behind_by_what_was_no_step_asks_for_no_state(weight):
    """That would be a collective in which those who are ahead take no part."""
    comm = Ranks(agreed=[[2], None], said=[[1], [4], ["validated", False, [4, 40, 1, 0]]])
    it = training(weight)
    it.whole = lambda: pytest.fail("nobody else is there")
    assert in_place_of(comm, it)(failing(LOST)) == "validated"
    assert it.state.step == 4 and weight.tolist() == [1.0, 2.0]


def test_who_is_ahead_gives_and_begins_again(weight):
    comm = Ranks(agreed=[[2], None], said=[[0], [3]])
    it = training(weight)
    in_place = in_place_of(comm, it)
    assert in_place(failing("first")) == "first"
    assert in_place(failing(LOST, "second")) == "second"
    assert it.state.step == 4 and weight.tolist() == [1.0, 2.0]


def test_nothing_is_taken_over_from_who_dies_while_giving(weight):
    comm = Ranks(agreed=[[2], [1], None], said=[[1], LOST, [0]])
    it = training(weight)
    assert in_place_of(comm, it)(failing(LOST, "again")) == "again"
    assert comm.fine == [False, False, True] and it.state.step == 4 and weight.tolist() == [1.0, 2.0]
    assert it.state.lost == [2, 1]


def test_the_next_rank_takes_over_the_files_once(weight):
    comm = Ranks(agreed=[[0], None], said=[[0]])
    comm.rank = 1
    it, calls = training(weight), []

    def redistribute():
        comm.rank = 0

    it.redistribute = redistribute
    in_place = in_place_of(comm, it)
    in_place.when_first.append(lambda: calls.append(comm.rank))
    in_place(failing(LOST, 7))
    assert calls == [0]


def test_too_few_are_left(weight):
    comm = Ranks(agreed=[[2]])
    with pytest.raises(RankLost, match="2 ranks are left, and --min-ranks is 3"):
        in_place_of(comm, training(weight), min_ranks=3)(failing(LOST))


def test_nobody_leaves_before_all_are_done(weight):
    comm = Ranks(agreed=[[2], None], said=[[0]])
    it = training(weight)
    in_place_of(comm, it).close()
    assert comm.fine == [True, True] and it.state.lost == [2]


def test_all_begin_again_where_others_are_in_no_phase(weight):
    comm = Ranks(agreed=[[2], None], said=[[AGAIN]])
    it = training(weight)
    with pytest.raises(RestartInProcess) as met:
        in_place_of(comm, it)(failing(LOST))
    assert met.value.ranks == [2] and it.shared == 0


def test_who_cannot_go_on_without_the_dead_does_not_leave(weight):
    comm = Ranks(agreed=[None, [1]])
    it = training(weight)
    it.all = False
    in_place_of(comm, it).close()
    with pytest.raises(RankLost, match="rank 1 has died before the end"):
        in_place_of(comm, it).close()


def test_what_is_no_death_comes_to_an_end(weight):
    comm = Ranks(agreed=[[], None] * MOST_ATTEMPTS, said=[[0]] * MOST_ATTEMPTS)
    with pytest.raises(RankLost, match="rank 2 has died"):
        in_place_of(comm, training(weight))(failing(*[LOST] * MOST_ATTEMPTS))


@pytest.mark.parametrize("other", ["parts", "survives"])
def test_where_nobody_can_go_on_an_error_is_an_error(weight, other):
    comm = Ranks()
    it = training(weight)
    if other == "parts":
        it.all = False
    else:
        comm.survives = False
    with pytest.raises(RankLost):
        in_place_of(comm, it)(failing(LOST))
