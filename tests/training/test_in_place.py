"""Phases in spite of deaths, on one of several ranks; what the others say is written down beforehand."""

from types import SimpleNamespace

import numpy as np
import pytest

from tf_dist.errors import RankLost
from tf_dist.strategies import AllReduce, ParameterServer
from tf_dist.training.begin_again import AGAIN, BeginAgain
from tf_dist.training.in_place import MOST_ATTEMPTS, InPlace


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


def trainer_of(comm, weight):
    """What `InPlace` sees of a trainer; ``weight`` is all there is of state."""
    piece = SimpleNamespace(read=lambda: weight, write=lambda values: np.copyto(weight, values))
    entry = SimpleNamespace(shape=weight.shape, dtype="float32", pieces=[piece])
    made = SimpleNamespace(
        comm=comm, mesh=SimpleNamespace(plain=True), strategy=AllReduce(), lost=[], step=4, tokens=40,
        stopped=False, whole=lambda: SimpleNamespace(entries=[entry]), shared=0,
        bad=SimpleNamespace(counters=[1, 0]),
    )  # fmt: skip

    def share_anew():
        made.shared += 1

    def resume_counting(tokens):
        made.tokens = tokens

    made.share_anew, made.resume_counting = share_anew, resume_counting
    return made


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
    assert InPlace(trainer_of(comm, weight))(failing(7)) == 7 and comm.fine == []


def test_a_phase_is_begun_again_together(weight, capsys):
    comm = Ranks(agreed=[[2], None], said=[[0]])
    trainer = trainer_of(comm, weight)
    in_place = InPlace(trainer)
    assert in_place(failing(LOST, 7)) == 7
    assert comm.fine == [False, True] and trainer.shared == 1 and trainer.lost == [2]
    assert [(one.lost, one.step) for one in in_place.recoveries] == [([2], 4)]
    assert "rank 2 died in step 5: 2 ranks go on after" in capsys.readouterr().out


def test_who_is_behind_takes_over_all_that_a_step_has_changed(weight):
    given = np.array([3.0, 4.0], np.float32)
    comm = Ranks(agreed=[[2], None], said=[[1], [5], ["logs", [5, 50, True, 3, 2]]], given=[given])
    trainer = trainer_of(comm, weight)
    assert InPlace(trainer)(failing(LOST)) == "logs"
    assert (trainer.step, trainer.tokens, trainer.stopped) == (5, 50, True)
    assert trainer.bad.counters == [3, 2]
    assert weight.tolist() == [3.0, 4.0]


def test_who_is_behind_by_what_was_no_step_asks_for_no_state(weight):
    """That would be a collective in which those who are ahead take no part."""
    comm = Ranks(agreed=[[2], None], said=[[1], [4], ["validated", [4, 40, False, 1, 0]]])
    trainer = trainer_of(comm, weight)
    trainer.whole = lambda: pytest.fail("nobody else is there")
    assert InPlace(trainer)(failing(LOST)) == "validated"
    assert trainer.step == 4 and weight.tolist() == [1.0, 2.0]


def test_who_is_ahead_gives_and_begins_again(weight):
    comm = Ranks(agreed=[[2], None], said=[[0], [3]])
    trainer = trainer_of(comm, weight)
    in_place = InPlace(trainer)
    assert in_place(failing("first")) == "first"
    assert in_place(failing(LOST, "second")) == "second"
    assert trainer.step == 4 and weight.tolist() == [1.0, 2.0]


def test_nothing_is_taken_over_from_who_dies_while_giving(weight):
    comm = Ranks(agreed=[[2], [1], None], said=[[1], LOST, [0]])
    trainer = trainer_of(comm, weight)
    assert InPlace(trainer)(failing(LOST, "again")) == "again"
    assert comm.fine == [False, False, True] and trainer.step == 4 and weight.tolist() == [1.0, 2.0]
    assert trainer.lost == [2, 1]


def test_the_next_rank_takes_over_the_files_once(weight):
    comm = Ranks(agreed=[[0], None], said=[[0]])
    comm.rank = 1
    trainer, calls = trainer_of(comm, weight), []
    in_place = InPlace(trainer)
    in_place.when_first.append(lambda: calls.append(comm.rank))

    def share_anew():
        comm.rank = 0

    trainer.share_anew = share_anew
    in_place(failing(LOST, 7))
    assert calls == [0]


def test_too_few_are_left(weight):
    comm = Ranks(agreed=[[2]])
    with pytest.raises(RankLost, match="2 ranks are left, and --min-ranks is 3"):
        InPlace(trainer_of(comm, weight), min_ranks=3)(failing(LOST))


def test_nobody_leaves_before_all_are_done(weight):
    comm = Ranks(agreed=[[2], None], said=[[0]])
    trainer = trainer_of(comm, weight)
    InPlace(trainer).close()
    assert comm.fine == [True, True] and trainer.lost == [2]


def test_all_begin_again_where_others_are_in_no_phase(weight):
    comm = Ranks(agreed=[[2], None], said=[[AGAIN]])
    trainer = trainer_of(comm, weight)
    with pytest.raises(BeginAgain) as met:
        InPlace(trainer)(failing(LOST))
    assert met.value.ranks == [2] and trainer.shared == 0


def test_who_cannot_go_on_without_the_dead_does_not_leave(weight):
    comm = Ranks(agreed=[None, [1]])
    trainer = trainer_of(comm, weight)
    trainer.strategy = ParameterServer()
    InPlace(trainer).close()
    with pytest.raises(RankLost, match="rank 1 has died before the end"):
        InPlace(trainer).close()


def test_what_is_no_death_comes_to_an_end(weight):
    comm = Ranks(agreed=[[], None] * MOST_ATTEMPTS, said=[[0]] * MOST_ATTEMPTS)
    with pytest.raises(RankLost, match="rank 2 has died"):
        InPlace(trainer_of(comm, weight))(failing(*[LOST] * MOST_ATTEMPTS))


@pytest.mark.parametrize("other", ["strategy", "mesh", "survives"])
def test_where_nobody_can_go_on_an_error_is_an_error(weight, other):
    comm = Ranks()
    trainer = trainer_of(comm, weight)
    if other == "strategy":
        trainer.strategy = ParameterServer()
    elif other == "mesh":
        trainer.mesh.plain = False
    else:
        comm.survives = False
    with pytest.raises(RankLost):
        InPlace(trainer)(failing(LOST))
