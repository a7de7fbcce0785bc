"""Beginning again without those who died, on one of several ranks; what the others say is written down."""

import weakref

import pytest

from tf_dist.errors import NumericError, RankLost, SavedAndStopped, TooFewLeft
from tf_dist.training.restart import AGAIN, DONE, MOST_IN_VAIN, Deaths, RestartInProcess, with_restarts

LOST = RankLost("rank 2 has died", [2])


class Ranks:
    """The Comm of rank 0. agreed: what `regroup` returns, in turn. said: what other ranks say, in turn."""

    survives, rank = True, 0

    def __init__(self, size=2, agreed=(), said=()):
        self.size, self.agreed, self.said, self.fine, self.own = size, list(agreed), list(said), [], []

    def first(self, count):
        self.training = count
        return self if self.rank < count else None

    def regroup(self, fine=True, at=""):
        self.fine.append(fine)
        return self.agreed.pop(0)

    def allgather_obj(self, value, what=""):
        self.own.append(value)
        others = self.said.pop(0)
        if isinstance(others, Exception):
            raise others
        return [value, *others]

    def understood(self, error):
        return error


def training(*outcomes):
    """A training that ends so, one time after the other; it keeps what it has been told."""
    left, told = list(outcomes), []

    def train(comm, deaths):
        told.append(list(deaths.lost))
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        deaths.over(outcome)

    train.told = told
    return train


def test_nobody_dies():
    comm, train = Ranks(agreed=[None], said=[[None]]), training(60)
    with_restarts(comm, train)
    assert train.told == [[]] and comm.fine == [True]


def test_all_begin_again():
    comm = Ranks(agreed=[[2], None, None], said=[[AGAIN], [None]])
    train, seen = training(LOST, 40), []
    with_restarts(comm, lambda part, deaths: (seen.append(deaths), train(part, deaths)))
    assert train.told == [[], [2]] and comm.fine == [False, True, True]
    assert [(one.lost, one.step) for one in seen[0].recoveries] == [([2], 40)]


def test_nothing_that_was_made_for_a_training_outlives_it():
    comm, left = Ranks(agreed=[[2], None, None], said=[[AGAIN], [None]]), []

    class Model:
        pass

    def train(part, deaths):
        assert not [one for one in left if one() is not None]
        model = Model()
        left.append(weakref.ref(model))
        if not deaths.lost:
            raise RankLost("rank 2 has died", [2])

    with_restarts(comm, train)
    assert len(left) == 2


def test_somebody_dies_while_all_agree():
    comm = Ranks(agreed=[[2], [1], None, None], said=[LOST, [AGAIN], [None]])
    train = training(LOST, 40)
    with_restarts(comm, train)
    assert train.told == [[], [2, 1]] and comm.fine == [False, False, True, True]


def test_what_phases_have_agreed_on_is_not_asked_again():
    """`InPlaceRecovery` has met others who are in no phase."""
    comm = Ranks(agreed=[None], said=[[None]])
    train = training(RestartInProcess([1]), 40)
    with_restarts(comm, train)
    assert train.told == [[], [1]] and comm.fine == [True]


@pytest.mark.parametrize(("others", "times"), [(DONE, 1), (AGAIN, 2), (7, 2)])
def test_who_is_done_begins_again_where_others_are_not(others, times):
    comm = Ranks(agreed=[[2], None, None], said=[[others], [None]])
    train = training(60, 60)
    with_restarts(comm, train)
    assert len(train.told) == times and comm.own[0] == DONE


def test_ranks_that_are_too_many_wait_until_they_are_needed():
    """Of 3, two share a model; then one of these dies."""
    comm = Ranks(size=3, agreed=[[0], None, None], said=[[AGAIN], [None]])
    comm.rank = 2
    train = training(60)

    def regroup(fine=True, at=""):
        if len(comm.fine) == 0:
            comm.rank, comm.size = 1, 2
        return Ranks.regroup(comm, fine)

    comm.regroup = regroup
    with_restarts(comm, train, together=2)
    assert train.told == [[0]] and comm.training == 2


@pytest.mark.parametrize("limits", [{"min_ranks": 2}, {"together": 2}])
def test_too_few_are_left(limits):
    comm = Ranks(agreed=[[1], None], said=[[]])
    train = training(LOST)

    def regroup(fine=True, at=""):
        comm.size = 1
        return Ranks.regroup(comm, fine)

    comm.regroup = regroup
    with pytest.raises(TooFewLeft, match="1 rank is left, and"):
        with_restarts(comm, train, **limits)


def test_all_leave_with_one_code():
    """Also who has only waited for the others, and was not told to stop."""
    comm = Ranks(agreed=[None], said=[["saved at step 7"]])
    with pytest.raises(SavedAndStopped, match="saved at step 7"):
        with_restarts(comm, training(60))
    comm = Ranks(agreed=[None], said=[[None]])
    with pytest.raises(SavedAndStopped, match="saved at step 8"):
        with_restarts(comm, training(SavedAndStopped("saved at step 8")))


@pytest.mark.parametrize("error", [NumericError("not finite"), TooFewLeft("1 rank is left")])
def test_other_errors_are_the_end(error):
    with pytest.raises(type(error)):
        with_restarts(Ranks(), training(error))


def test_where_nobody_has_died_it_is_not_the_first_training_either():
    """Which may set aside an earlier run's files."""
    comm = Ranks(agreed=[[], None, None], said=[[AGAIN], [None]])
    seen = []
    train = training(LOST, 40)
    with_restarts(comm, lambda part, deaths: (seen.append(bool(deaths.restarts)), train(part, deaths)))
    assert seen == [False, True]


def test_where_mpi_does_not_go_on_a_death_is_the_end():
    comm = Ranks()
    comm.survives = False
    with pytest.raises(RankLost):
        with_restarts(comm, training(LOST))


def test_what_is_no_death_comes_to_an_end():
    tries = MOST_IN_VAIN + 1
    comm = Ranks(agreed=[[], None] * tries, said=[[AGAIN]] * tries)
    with pytest.raises(RankLost):
        with_restarts(comm, training(*[LOST] * tries))


def test_recoveries_are_counted_once():
    deaths = Deaths()
    assert deaths.over(3) is None and not deaths.restarts
    deaths.begin([1], 0.0)
    assert deaths.restarts == 1 and deaths.over(3).lost == [1]
    assert deaths.over(4) is None and deaths.lost == [1]
