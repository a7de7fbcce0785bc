"""In-place recovery: the surviving ranks finish the step in which a rank failed, without it.

For `--strategy allreduce` under ``mpirun --with-ft ulfm``, where every rank has all weights and takes every
step. A training is a list of *phases*: a step, a validation, a checkpoint, an agreement. All ranks go through
the same ones, and each has collectives that no rank leaves before all have entered it. So when a rank fails
the others are either inside one phase, or some have just left it, and are inside the next one.

A rank that detects the failure revokes the communicator, which interrupts all others. The survivors shrink
it, reassign the work of failed ranks, and compare how many phases they have finished. A rank that is behind
receives the result of the last phase, and with it weights and optimizer, from one that is ahead; then all
attempt the next phase. Nothing else has to be undone: a step changes weights after its last collective.

The unit of arithmetic is the micro-batch, so the weights are, bit for bit, those of a run without failures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tf_dist.checkpoint.sharded_state import ShardedState
from tf_dist.comm.formatting import counted, named
from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import RankLost
from tf_dist.training.restart import PHASE, Recovery, RestartInProcess, regrouped
from tf_dist.training.train_state import TrainState

# A phase that fails more often has another cause than failed ranks.
MOST_ATTEMPTS = 100
LOG = logging.getLogger(__name__)


class _Ahead(NamedTuple):
    """State of a rank that is a phase ahead: the result of the phase, and all arrays if that was a step."""

    result: Any
    stopped: bool
    counters: list[int]
    arrays: list[np.ndarray]


class Phase:
    """A phase under way, from `InPlaceRecovery.phase`: attempted until it is ``done``.

    Attributes:
        done: this rank, or one whose result it has taken over, has finished the phase.
        result: of the phase, once it is done.
    """

    def __init__(self, recover: Callable[[], _Ahead | None] | None) -> None:
        self._recover, self._attempts = recover, 0
        self.done = False
        self.result: Any = None

    def finish(self, result: Any) -> None:
        """Declare the phase done on this rank; the result is that of `InPlaceRecovery.__call__`."""
        self.done, self.result = True, result

    def recover(self, error: RankLost) -> None:
        """Go on without failed ranks, in the handler of an error: attempt the phase again unless ``done``.

        Raises:
            RankLost: ``error``, if this phase cannot be finished without them.
            TooFewLeft: fewer than ``min_ranks`` live.
            RestartInProcess: a rank has detected the failure outside all phases.
        """
        if self._recover is None or isinstance(error, RestartInProcess):
            raise error
        ahead = self._recover()
        self._attempts += 1
        if ahead is not None:
            self.finish(ahead.result)
        elif self._attempts == MOST_ATTEMPTS:
            raise error


class InPlaceRecovery:
    """Runs the phases of a training in spite of failed ranks.

    Args:
        state: of the training.
        comm: all ranks.
        whole: the sharded state, of which every rank holds everything; a collective.
        redistribute: reassigns all work to the surviving ranks; a collective.
        all_have_all: every rank holds everything, and a step can be finished without failed ranks.
        min_ranks: with fewer the run ends, with exit code 70.

    Attributes:
        recoveries: so far.
        when_first: called on a rank that becomes the first one, which owns the files.
        when_lost: called on every surviving rank, after each failure.
    """

    def __init__(
        self,
        state: TrainState,
        comm: Comm,
        whole: Callable[[], ShardedState],
        redistribute: Callable[[], None],
        all_have_all: bool,
        min_ranks: int = 1,
    ) -> None:
        self._state, self._comm, self._whole, self._redistribute = state, comm, whole, redistribute
        self._all_have_all, self._min_ranks = all_have_all, min_ranks
        self._phases, self._result, self._inside = 0, None, False
        self.recoveries: list[Recovery] = []
        self.when_first: list[Callable[[], None]] = []
        self.when_lost: list[Callable[[], None]] = []

    @property
    def can(self) -> bool:
        """Whether a failed rank is survived: all ranks hold everything, and MPI lets them go on."""
        return self._comm.survives and self._all_have_all

    def __call__(self, do: Callable[[], Any]) -> Any:
        """Run a phase; a collective.

        Args:
            do: collectives, the last of which no rank leaves before all have entered it, and only after that
                what must not happen twice. It is attempted again after a failure.

        Returns:
            Its result: a JSON value that is the same on every rank, or that only its own rank uses.

        Raises:
            RankLost, TooFewLeft, RestartInProcess: as `Phase.recover`.
        """
        with self.phase() as phase:
            while not phase.done:
                try:
                    phase.finish(do())
                except RankLost as error:
                    phase.recover(error)
        return phase.result

    @contextmanager
    def phase(self) -> Iterator[Phase]:
        """A phase whose attempts the caller makes, as `__call__` does. A nested one is part of the outer."""
        if self._inside or not self.can:
            yield Phase(None)
            return
        self._inside = True
        try:
            phase = Phase(lambda: self._recover(fine=False))
            yield phase
            self._result = phase.result
            self._phases += 1
        finally:
            self._inside = False

    def close(self) -> None:
        """Wait until all ranks have finished all phases, as one that is behind needs others; a collective.

        Raises:
            RankLost: a rank has failed, and this training does not survive it.
        """
        if self.can:
            self._recover(fine=True)
        elif (lost := self._comm.regroup()) is not None:
            raise RankLost(f"{named(lost)} ha{'s' if len(lost) == 1 else 've'} died before the end", lost)

    # After a failure -----------------------------------------------------------------------------

    def _recover(self, fine: bool) -> _Ahead | None:
        """Catch up with the other survivors; returns what this rank had to take over, if anything.

        Args:
            fine: this rank knows of no failure.
        """
        begun = time.perf_counter()
        first, ahead, all_inside = self._comm.rank == 0, None, True

        def catch_up() -> None:
            nonlocal ahead, all_inside
            all_inside, ahead = self._compare_phases()

        lost = regrouped(self._comm, catch_up, fine, self._min_ranks) or []
        if not all_inside:
            raise RestartInProcess(lost)
        if ahead is not None:
            self._take_over(ahead)
        if lost:
            self._note(lost, 1e3 * (time.perf_counter() - begun), first)
        return ahead

    def _compare_phases(self) -> tuple[bool, _Ahead | None]:
        """Compare phases with the other survivors; a collective.

        Returns:
            Whether all others are in a phase as well; and what this rank has to take over.
        """
        phases = self._comm.allgather_obj(self._phases, what=PHASE)
        if min(phases) < 0:
            return False, None
        self._redistribute()
        if min(phases) == max(phases):
            return True, None
        assert max(phases) - min(phases) == 1, "a phase ended before all had come to its last collective"
        ahead = self._broadcast_from(phases.index(max(phases)))
        return True, ahead if self._phases < max(phases) else None

    def _broadcast_from(self, source: int) -> _Ahead:
        """Broadcast from a rank what the phase that only some have finished has changed; a collective."""
        state, comm = self._state, self._comm
        steps = comm.allgather_obj(state.step)
        result, stopped, counters = comm.broadcast_obj([self._result, state.stopped, state.counters], source)
        arrays = []
        if min(steps) < max(steps):
            for entry in self._whole().entries:
                array = np.empty(prod(entry.shape), entry.dtype)
                if comm.rank == source:
                    array[:] = entry.pieces[0].read()
                comm.broadcast(array.view(np.uint8), source)
                arrays.append(array)
        return _Ahead(result, stopped, counters, arrays)

    def _take_over(self, ahead: _Ahead) -> None:
        # What follows a step (spike detection, rows of metrics) this rank does itself, from the result.
        self._state.counters, self._state.stopped = ahead.counters, ahead.stopped
        # Without arrays it was no step, and the others would not join the collective `whole`.
        if ahead.arrays:
            for entry, array in zip(self._whole().entries, ahead.arrays, strict=True):
                entry.pieces[0].write(array)

    def _note(self, lost: list[int], ms: float, was_first: bool) -> None:
        self._state.lost += lost
        self.recoveries.append(Recovery(lost, self._state.step, ms))
        for call in self.when_lost:
            call()
        if not was_first and self._comm.rank == 0:
            for take_over in self.when_first:
                take_over()
        left = counted(self._comm.size)
        once(LOG, self._comm).warning(
            f"{named(lost)} died in step {self._state.step + 1}: {left} go on after {ms:.0f} ms"
        )
