"""Going on in place where a rank is killed: the others finish the step that was under way, without it.

For `--strategy allreduce` under ``mpirun --with-ft ulfm``, where every rank has all weights and takes every
step. A training is a list of *phases*: a step, a validation, a checkpoint, an agreement. All ranks go through
the same ones, and each has collectives that no rank leaves before all have come to it. So when somebody dies
the others are either inside one phase, or some have just left it, and are inside the next one.

Whoever meets the death revokes the communicator, which calls all back; the others make a smaller one, share
out the work of the dead, and compare how many phases they have done. Who is behind takes over the result of
the last one, and with it weights and optimizer, from one who is ahead; then all begin the next phase, again
or for the first time. Nothing else has to be undone: a step changes weights after its last collective.

The unit of arithmetic is the micro-batch, so the weights are, bit for bit, those of a run that nobody left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tf_dist.comm import output
from tf_dist.comm.words import counted, named
from tf_dist.errors import RankLost
from tf_dist.training.begin_again import PHASE, BeginAgain, Recovery, regrouped

# A phase that fails more often does not fail because of deaths.
MOST_ATTEMPTS = 100

if TYPE_CHECKING:
    from tf_dist.training.trainer import Trainer


class _Ahead(NamedTuple):
    """What a rank takes over from one that is a phase ahead: its result, and all state if that was a step."""

    result: Any
    counters: list[Any]
    arrays: list[np.ndarray]


class InPlace:
    """Runs the phases of a training in spite of deaths.

    Args:
        trainer: whose phases they are.
        min_ranks: with fewer the run ends, with exit code 70.

    Attributes:
        recoveries: so far.
        when_first: called where a death has made this rank the first one, which has the files.
        when_lost: called on every rank that is left, after each death.
    """

    def __init__(self, trainer: Trainer, min_ranks: int = 1) -> None:
        self._trainer, self._min_ranks = trainer, min_ranks
        self._phases, self._result, self._inside = 0, None, False
        self.recoveries: list[Recovery] = []
        self.when_first: list[Callable[[], None]] = []
        self.when_lost: list[Callable[[], None]] = []

    @property
    def can(self) -> bool:
        """Whether a death is survived: all ranks hold everything, and MPI lets them."""
        trainer = self._trainer
        finishes = trainer.strategy.traits.finishes_without_dead
        return trainer.comm.survives and trainer.mesh.plain and finishes

    def __call__(self, do: Callable[[], Any]) -> Any:
        """Run a phase; a collective.

        Args:
            do: collectives, the last of which no rank leaves before all have come to it, and only then what
                would count twice if it were done twice. It is begun again after a death.

        Returns:
            Its result, which must be the same JSON value on every rank, or matter to none but its own.

        Raises:
            RankLost: where a death is not survived.
            TooFewLeft: fewer than ``min_ranks`` live.
            BeginAgain: a rank has met the death outside all phases.
        """
        if self._inside or not self.can:
            return do()
        self._inside = True
        try:
            self._result = self._done(do)
            self._phases += 1
        finally:
            self._inside = False
        return self._result

    def _done(self, do: Callable[[], Any]) -> Any:
        for _ in range(MOST_ATTEMPTS):
            try:
                return do()
            except BeginAgain:
                raise
            except RankLost as error:
                failed, ahead = error, self._recover(fine=False)
                if ahead is not None:
                    return ahead.result
        raise failed

    def close(self) -> None:
        """All have done all phases; a collective. Who leaves before could not help who is behind.

        Raises:
            RankLost: somebody has died, and what is done here cannot go on without him.
        """
        if self.can:
            self._recover(fine=True)
        elif (lost := self._trainer.comm.regroup()) is not None:
            raise RankLost(f"{named(lost)} ha{'s' if len(lost) == 1 else 've'} died before the end", lost)

    # After a death -------------------------------------------------------------------------------

    def _recover(self, fine: bool) -> _Ahead | None:
        """Be as far as all others who live; what was to be taken over from them.

        Args:
            fine: nobody has died as far as this rank knows.
        """
        trainer, begun = self._trainer, time.perf_counter()
        first, ahead, all_go_on = trainer.comm.rank == 0, None, True

        def meet() -> None:
            nonlocal ahead, all_go_on
            all_go_on, ahead = self._caught_up()

        lost = regrouped(trainer.comm, meet, fine, self._min_ranks) or []
        if not all_go_on:
            raise BeginAgain(lost)
        if ahead is not None:
            self._take_over(ahead)
        if lost:
            self._note(lost, 1e3 * (time.perf_counter() - begun), first)
        return ahead

    def _caught_up(self) -> tuple[bool, _Ahead | None]:
        """Be where all others are, once all are fine; a collective.

        Returns:
            Whether all others are at this training as well, and what this rank has to take over.
        """
        trainer = self._trainer
        phases = trainer.comm.allgather_obj(self._phases, what=PHASE)
        if min(phases) < 0:
            return False, None
        trainer.share_anew()
        if min(phases) == max(phases):
            return True, None
        assert max(phases) - min(phases) == 1, "a phase ended before all had come to its last collective"
        ahead = self._given_by(phases.index(max(phases)))
        return True, ahead if self._phases < max(phases) else None

    def _given_by(self, source: int) -> _Ahead:
        """What a rank has of the phase that it has done, and some others have not; a collective."""
        trainer, comm = self._trainer, self._trainer.comm
        mine = [self._result, [trainer.step, trainer.tokens, trainer.stopped, *trainer.bad.counters]]
        steps = comm.allgather_obj(trainer.step)
        result, counters = comm.broadcast_obj(mine, source)
        arrays = []
        if min(steps) < max(steps):
            for entry in trainer.whole().entries:
                array = np.empty(prod(entry.shape), entry.dtype)
                if comm.rank == source:
                    array[:] = entry.pieces[0].read()
                comm.broadcast(array.view(np.uint8), source)
                arrays.append(array)
        return _Ahead(result, counters, arrays)

    def _take_over(self, ahead: _Ahead) -> None:
        trainer = self._trainer
        trainer.step, tokens, trainer.stopped, *trainer.bad.counters = ahead.counters
        trainer.resume_counting(tokens)
        if (
            ahead.arrays
        ):  # else it was no step; and to ask for the whole is a collective, of which others know
            for entry, array in zip(trainer.whole().entries, ahead.arrays, strict=True):
                entry.pieces[0].write(array)

    def _note(self, lost: list[int], ms: float, was_first: bool) -> None:
        trainer = self._trainer
        trainer.lost += lost
        self.recoveries.append(Recovery(lost, trainer.step, ms))
        for call in self.when_lost:
            call()
        if trainer.comm.rank:
            return
        if not was_first:
            for take_over in self.when_first:
                take_over()
        left = counted(trainer.comm.size)
        output.say(f"{named(lost)} died in step {trainer.step + 1}: {left} go on after {ms:.0f} ms")
