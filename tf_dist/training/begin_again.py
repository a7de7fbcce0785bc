"""Beginning again from the newest checkpoint, with the ranks that live and without starting any process.

`InPlace` finishes the step in which somebody died. That needs every rank to have everything. Where it has
not (a divided optimizer or model, a master that is gone), or somebody dies before the first step, the others
still need no new processes: they make a smaller communicator, and do once more what a job does from the model
on: share it out, read the newest checkpoint, train. What is lost is the steps since then; they are taken
again, with the same data, so the weights are in the end those of a run that nobody left.

Where ranks share a model, some may be too many now: 3 for a model on 2. They wait until they are needed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from tf_dist.comm.base import AGREEMENT, Comm
from tf_dist.comm.stalls import AT_THE_END
from tf_dist.errors import RankLost, SavedAndStopped, TooFewLeft, behind

if TYPE_CHECKING:
    from tf_dist.training.neighbours import Neighbours

# What a rank says after a death that is in no phase of a training (`InPlace`): phases count from 0 on.
AGAIN, DONE = -1, -2
# These travel in one message, whatever a rank was doing (`tf_dist.comm.control`).
PHASE = "where each rank is after a death"
# An error that comes back so often though nobody dies has another cause.
MOST_IN_VAIN = 10


class Recovery(NamedTuple):
    """What it took to go on. lost: ranks by `Comm.origin`. step: under way. ms: from the error on."""

    lost: list[int]
    step: int
    ms: float


class BeginAgain(RankLost):
    """All have agreed that the training is to be begun again, with those who live.

    Args:
        lost: ranks that have died, by `Comm.origin`.
    """

    def __init__(self, lost: list[int]) -> None:
        super().__init__("the training begins again", lost)


class Deaths:
    """What a training that is begun again has to know of the ones before.

    Attributes:
        lost: ranks that have died so far, by `Comm.origin`.
        newest: those of them because of whom all begin again now.
        recoveries: so far.
        trainings: that the job has begun before this one.
        neighbours: keep copies in memory, where that was asked for.
        when_lost: called before all begin again, for what the training that ends now has under way.
    """

    def __init__(self, neighbours: Neighbours | None = None) -> None:
        self.lost, self.newest, self.recoveries = list[int](), list[int](), list[Recovery]()
        self.trainings, self.when_lost = 0, list[Callable[[], None]]()
        self.neighbours = neighbours
        self._since: float | None = None

    def begin(self, lost: list[int], at: float) -> None:
        """Ranks have died; the others met it at this time (``time.perf_counter``)."""
        self.lost += lost
        self.newest, self._since = lost, at
        self.trainings += 1
        while self.when_lost:  # and forget them, with all that they know
            self.when_lost.pop()()

    def over(self, step: int) -> Recovery | None:
        """All go on from this step; None where they do not do so because of a death."""
        if self._since is None:
            return None
        ms, self._since = 1e3 * (time.perf_counter() - self._since), None
        self.recoveries.append(Recovery(self.newest, step, ms))
        return self.recoveries[-1]


def in_spite_of_deaths(
    comm: Comm,
    train: Callable[[Comm, Deaths], None],
    min_ranks: int = 1,
    together: int = 1,
    neighbours: Neighbours | None = None,
) -> None:
    """Train, and begin again whenever ranks have died and MPI lets the others go on; a collective.

    Args:
        comm: all ranks.
        train: the whole training with some of the ranks, from the newest checkpoint on where there have been
            deaths. Leaves by `RankLost` where it cannot go on.
        min_ranks: with fewer the run ends.
        together: ranks that share a model: as many multiples of it train as there are.
        neighbours: keep copies in memory, if ``train`` lets them.

    Raises:
        TooFewLeft: fewer than ``min_ranks`` or ``together`` live.
        RankLost: again and again, and nobody dies.
    """
    deaths, in_vain = Deaths(neighbours), 0
    while True:
        try:
            stopped = _train_or_wait(comm, train, deaths, together)
            met, lost = time.perf_counter(), _agreed(comm, True, min_ranks)
        except Exception as error:
            met, lost = time.perf_counter(), _lost(comm, error, min_ranks)
            in_vain = 0 if lost else in_vain + 1
            if in_vain > MOST_IN_VAIN:
                raise
        if lost is None:
            _leave_together(comm, stopped)
            return
        deaths.begin(lost, met)
        gc.collect()  # the model, and all that was made for it


def _train_or_wait(
    comm: Comm, train: Callable[[Comm, Deaths], None], deaths: Deaths, together: int
) -> str | None:
    """Train where this rank is needed; what is said where that has stopped on a signal."""
    count = comm.size // together * together
    if not count:
        ranks = f"{comm.size} rank{'s are' if comm.size > 1 else ' is'}"
        raise TooFewLeft(f"{ranks} left, and {together} share the model")
    if deaths.trainings and deaths.neighbours is not None:
        deaths.neighbours.hand_over(comm, count)
    part = comm.first(count)
    try:
        if part is not None:
            train(part, deaths)
    except SavedAndStopped as stopped:
        return str(stopped)
    return None


def _lost(comm: Comm, error: Exception, min_ranks: int) -> list[int]:
    """Who has died, if this error comes of it; a collective. Any other error is raised."""
    ours = comm.understood(behind(error))
    if not isinstance(ours, RankLost) or isinstance(ours, TooFewLeft) or not comm.survives:
        raise error
    if isinstance(ours, BeginAgain):  # that is agreed
        return ours.ranks
    return _agreed(comm, False, min_ranks) or []


def _agreed(comm: Comm, done: bool, min_ranks: int) -> list[int] | None:
    """Wait for all who live: None where all are done, else who has died, and all begin again; a collective.

    ``done``: this rank has trained to the end, or is not needed for it.
    """
    all_done = done

    def meet() -> None:
        nonlocal all_done
        all_done = set(comm.allgather_obj(DONE if done else AGAIN, what=PHASE)) == {DONE}

    lost = regrouped(comm, meet, done, min_ranks, AT_THE_END if done else AGREEMENT)
    return None if all_done else lost


def regrouped(
    comm: Comm, meet: Callable[[], None], fine: bool, min_ranks: int, at: str = AGREEMENT
) -> list[int] | None:
    """Go on as those who live, all of whom have met; a collective.

    Args:
        comm: all ranks.
        meet: collectives of those who are left; begun again where somebody dies in them.
        fine: this rank knows of no death.
        min_ranks: with fewer the run ends.
        at: what is said of a rank that waits here.

    Returns:
        None where all were fine, and nobody had to meet; else who has died, by `Comm.origin`.

    Raises:
        TooFewLeft: fewer than ``min_ranks`` live.
    """
    lost: list[int] | None = None
    while (gone := comm.regroup(fine, at)) is not None:
        lost = (lost or []) + gone
        if comm.size < min_ranks:
            left = f"{comm.size} rank{'s are' if comm.size > 1 else ' is'} left"
            raise TooFewLeft(f"{left}, and --min-ranks is {min_ranks}")
        try:
            meet()
            fine = True
        except RankLost:
            fine = False
    return lost


def _leave_together(comm: Comm, stopped: str | None) -> None:
    """Leave with one exit code, also the ranks that were not needed.

    Raises:
        SavedAndStopped: others have.
    """
    said = stopped
    if comm.survives:
        try:
            said = next(filter(None, comm.allgather_obj(stopped)), None)
        except RankLost:
            pass  # it had nothing to do any more
    if said:
        raise SavedAndStopped(said)
