"""In-process restart: after a death the others train on from the latest snapshot, in their processes.

`InPlaceRecovery` finishes the step in which a rank died. That needs a full replica on every rank. Where there
is none (a sharded optimizer or model, a lost parameter server), or before the first step, the others
still need no new processes: they shrink the communicator, and repeat what a job does from building the model
on: partition it, restore the latest snapshot (`tf_dist.training.snapshot.recover`), train. The steps since
that snapshot are lost, and repeated with the same data, so the final weights are those of a run without
deaths.

Where ranks share a model, some may be left over: 1 of 3 if a model takes 2. They wait as spares.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tf_dist.comm.health.hang_detector import AT_THE_END
from tf_dist.comm.transport.base import AGREEMENT, Comm
from tf_dist.errors import RankLost, SavedAndStopped, TooFewLeft, behind
from tf_dist.training.in_memory_checkpoint import PeerCheckpoints

# Reported instead of a phase (`InPlaceRecovery` counts these from 0): restart; trained to the end.
AGAIN, DONE = -1, -2
# Name of the message that carries them, whatever a rank was doing (`tf_dist.comm.control_messages`).
PHASE = "where each rank is after a death"
# An error that recurs this often while no rank dies has another cause.
MOST_IN_VAIN = 10


class Recovery(NamedTuple):
    """A survived death. lost: ranks, by `Comm.origin`. step: in progress. ms: from the error on."""

    lost: list[int]
    step: int
    ms: float


class RestartInProcess(RankLost):
    """All surviving ranks have agreed to restart.

    Args:
        lost: ranks that have died, by `Comm.origin`.
    """

    def __init__(self, lost: list[int]) -> None:
        super().__init__("the training restarts", lost)


class Deaths:
    """The deaths that a job has survived, for the training that continues.

    Args:
        peers: peer checkpoints, if they are wanted.

    Attributes:
        lost: ranks that have died so far, by `Comm.origin`.
        newest: those of them that caused the last restart.
        recoveries: so far.
        restarts: of the job so far.
        in_vain: consecutive errors without a death.
        peers: as given.
        before_restart: called once before the next restart, to end background work of this training.
    """

    def __init__(self, peers: PeerCheckpoints | None = None) -> None:
        self.lost, self.newest, self.recoveries = list[int](), list[int](), list[Recovery]()
        self.restarts, self.in_vain, self.before_restart = 0, 0, list[Callable[[], None]]()
        self.peers = peers
        self._since: float | None = None

    def begin(self, lost: list[int], at: float) -> None:
        """Ranks have died; the others noticed it at this time (``time.perf_counter``)."""
        self.lost += lost
        self.newest, self._since = lost, at
        self.restarts += 1
        while self.before_restart:  # dropped as well, with the objects that they refer to
            self.before_restart.pop()()

    def over(self, step: int) -> Recovery | None:
        """All continue from this step; None unless they do so because of a death."""
        if self._since is None:
            return None
        ms, self._since = 1e3 * (time.perf_counter() - self._since), None
        self.recoveries.append(Recovery(self.newest, step, ms))
        return self.recoveries[-1]


class Attempt:
    """One training, with the ranks that are left; from `attempts`.

    Attributes:
        deaths: of the trainings before.
        lost: ranks that have died in it, or none, and all begin again; None: it is over.
        stopped: what is said where it has stopped on a signal.
        met: when this rank met a death, or was done (``time.perf_counter``).
    """

    def __init__(self, comm: Comm, deaths: Deaths, min_ranks: int, together: int) -> None:
        self._comm, self._min_ranks, self._together = comm, min_ranks, together
        self.deaths = deaths
        self.lost: list[int] | None = None
        self.stopped: str | None = None
        self.met = 0.0

    def ranks(self) -> Comm | None:
        """The ranks that train; None where this one is not needed. A collective, inside of `outlived`.

        Raises:
            TooFewLeft: fewer than share a model live.
        """
        comm, together, deaths = self._comm, self._together, self.deaths
        count = comm.size // together * together
        if not count:
            ranks = f"{comm.size} rank{'s are' if comm.size > 1 else ' is'}"
            raise TooFewLeft(f"{ranks} left, and {together} share the model")
        if deaths.restarts and deaths.peers is not None:
            deaths.peers.hand_over(comm, count)
        return comm.first(count)

    @contextmanager
    def outlived(self) -> Iterator[None]:
        """Around the training: agree at its end, or after an error, on who has died; a collective.

        Raises:
            Exception: what the training raises, unless it comes of a death, and MPI lets the others go on.
        """
        try:
            try:
                yield
            except SavedAndStopped as stopped:
                self.stopped = str(stopped)
            self.met = time.perf_counter()
            self.lost = _agreed(self._comm, True, self._min_ranks)
        except Exception as error:
            self.met = time.perf_counter()
            self.lost = _lost(self._comm, error, self._min_ranks)
            self.deaths.in_vain = 0 if self.lost else self.deaths.in_vain + 1
            if self.deaths.in_vain > MOST_IN_VAIN:
                raise


def attempts(
    comm: Comm, min_ranks: int = 1, together: int = 1, peers: PeerCheckpoints | None = None
) -> Iterator[Attempt]:
    """Trainings, one after another, until one is over without deaths; a collective.

    Each is gone through as ``with attempt.outlived(): ...``, which asks for `Attempt.ranks`, and trains with
    these from the newest checkpoint on where there have been deaths. It leaves by `RankLost` where it cannot
    go on. Nothing outside of it may keep what was made for a training.

    Args:
        comm: all ranks.
        min_ranks: with fewer the run ends.
        together: ranks that share a model: as many multiples of it train as there are.
        peers: peer checkpoints, if the training saves them.

    Raises:
        TooFewLeft: fewer than ``min_ranks`` or ``together`` live.
        RankLost: again and again, and nobody dies.
    """
    deaths = Deaths(peers)
    while True:
        attempt = Attempt(comm, deaths, min_ranks, together)
        yield attempt
        if attempt.lost is None:
            _leave_together(comm, attempt.stopped)
            return
        deaths.begin(attempt.lost, attempt.met)
        gc.collect()  # the model, and all that was made for it


def with_restarts(
    comm: Comm,
    train: Callable[[Comm, Deaths], None],
    min_ranks: int = 1,
    together: int = 1,
    peers: PeerCheckpoints | None = None,
) -> None:
    """Call ``train`` in each of the `attempts`; a collective.

    Args:
        comm: all ranks.
        train: the whole training, on some of the ranks.
        min_ranks: as in `attempts`, as are the others.
        together: ranks that share a model.
        peers: peer checkpoints, if ``train`` saves them.
    """
    for attempt in attempts(comm, min_ranks, together, peers):
        with attempt.outlived():
            _train_in(attempt, train)


def _train_in(attempt: Attempt, train: Callable[[Comm, Deaths], None]) -> None:
    ranks = attempt.ranks()
    if ranks is not None:
        train(ranks, attempt.deaths)


def _lost(comm: Comm, error: Exception, min_ranks: int) -> list[int]:
    """The ranks that have died, if that is the cause of this error; a collective. Raises any other error."""
    ours = comm.understood(behind(error))
    if not isinstance(ours, RankLost) or isinstance(ours, TooFewLeft) or not comm.survives:
        raise error
    if isinstance(ours, RestartInProcess):  # agreed already
        return ours.ranks
    return _agreed(comm, False, min_ranks) or []


def _agreed(comm: Comm, done: bool, min_ranks: int) -> list[int] | None:
    """Agree with all living ranks; a collective.

    Args:
        comm: all ranks.
        done: this rank has trained to the end, or is a spare.
        min_ranks: with fewer the run ends.

    Returns:
        None if all are done; otherwise the ranks that have died, and all restart.
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
    """Shrink the communicator to the living ranks, and synchronize them; a collective.

    Args:
        comm: all ranks.
        meet: collectives of the living ranks; repeated if a rank dies in them.
        fine: this rank knows of no death.
        min_ranks: with fewer the run ends.
        at: label shown while a rank waits here.

    Returns:
        None if no rank knew of a death, and ``meet`` was not called; otherwise the ranks that have died, by
        `Comm.origin`.

    Raises:
        TooFewLeft: fewer than ``min_ranks`` are alive.
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
    """End with one exit code on all ranks, spares included.

    Raises:
        SavedAndStopped: a signal has stopped the training, on this rank or others.
    """
    message = stopped
    if comm.survives:
        try:
            message = next(filter(None, comm.allgather_obj(stopped)), None)
        except RankLost:
            pass  # it had nothing left to do
    if message:
        raise SavedAndStopped(message)
