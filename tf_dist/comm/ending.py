"""How a job ends: all ranks together, with one voice, and never by waiting for ever.

Under plain ``mpirun`` a rank that raises leaves the others inside a collective for good. `Ending`
makes three promises:

* An uncaught error on *every* rank (bad flags, a missing file) is printed once and ends the job with
  that error's exit code.
* An uncaught error, or ``sys.exit`` with a status, on *some* ranks is printed by those ranks with its
  traceback, and the whole job is aborted with exit code 70 (or the code of a `TfDistError`).
* A rank that simply leaves, while another waits for it in a collective, is named and the job is
  aborted with exit code 70.

Ranks that neither fail nor leave, and do not come, are the business of `tf_dist.comm.watchdog`.

The ranks find each other on a communicator of their own, so nothing here disturbs the training.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from tf_dist import terminal
from tf_dist.comm.base import Comm
from tf_dist.comm.stalls import AT_THE_END
from tf_dist.comm.words import named
from tf_dist.errors import SavedAndStopped, TfDistError, behind, of_memory

if TYPE_CHECKING:
    from tf_dist.comm.watchdog import Watchdog

# How long a failing rank waits for the others to fail too, before it speaks for itself.
RENDEZVOUS_S = 1.0
# How often rank 0 (or, when it has left, everyone) looks for notes of ranks that left.
LOOK_EVERY_S = 0.25
# How long a collective may still take after a rank has left: what it sent before may be under way.
GRACE_S = 2.0
# How long a rank waits to be ended by another one's abort, where it must not abort as well.
ABORTED_S = 10.0
NOTE_TAG = 7
EXIT_RANK_FAILED = TfDistError.exit_code


class Ending:
    """Installs the hooks; made once, by ``connect()``. Alone until `join` is called."""

    def __init__(self) -> None:
        self._mpi: Any = None
        self.rank = 0
        # Ranks above 0 later send their stdout and stderr to a log file; last words go to the terminal.
        self._console = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
        self._comm: Comm | None = None
        self._dead: list[int] = []
        self._exit: tuple[Any, str] | None = None
        # Called with exit code and message on a rank that fails, while it still can.
        self.note: Callable[[int, str], None] | None = None
        self.watchdog: Watchdog | None = None
        self._left = threading.Event()
        self._original_exit = sys.exit
        sys.excepthook = self._on_exception
        threading.excepthook = self._on_thread_exception
        sys.exit = self._on_exit
        atexit.register(self._leave)
        self._watcher = threading.Thread(target=self._watch, name="tf_dist-ending", daemon=True)

    def join(self, mpi: Any, can_watch: bool) -> None:
        """Find the other ranks; once.

        Args:
            mpi: a communicator of all ranks, for nobody else's use.
            can_watch: whether MPI may be called from a second thread.
        """
        if self._mpi is not None:
            return
        self._mpi, self.rank = mpi, mpi.Get_rank()
        self._leaving = mpi.Dup()
        if can_watch:
            self._watcher.start()

    def watch(self, comm: Comm) -> None:
        """Name the Comm whose collectives must not wait for a rank that has left."""
        self._comm = comm

    def speak(self, text: str) -> None:
        """Print on the terminal, from whichever rank."""
        terminal.write(text.removesuffix("\n"), self._console)

    def end(self, message: str) -> NoReturn:
        """End the job with 70, with a word of the thread that calls, whatever the main thread is doing."""
        self._note(message)
        self.speak(f"error: {message}")
        self._abort(EXIT_RANK_FAILED)

    # Errors --------------------------------------------------------------------------------------

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        error = of_memory(behind(error))
        foreseen = isinstance(error, TfDistError)
        message = f"error: {error}" if foreseen else "".join(traceback.format_exception(kind, error, trace))
        code = error.exit_code if isinstance(error, TfDistError) else EXIT_RANK_FAILED
        self._fail(message, code)

    def _on_thread_exception(self, arguments: threading.ExceptHookArgs) -> None:
        lines = traceback.format_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
        name = arguments.thread.name if arguments.thread else "?"
        self._note(lines[-1])
        self.speak(f"rank {self.rank}, thread {name}:\n" + "".join(lines))
        self._abort(EXIT_RANK_FAILED)

    def _fail(self, message: str, code: int) -> NoReturn:
        """Say why, once, and end the job."""
        _flush()
        self._note(message, code)
        if self._mpi is None:
            self.speak(message)
        elif self._everyone_is_here():
            self._speak_once(message, self._mpi)
        elif (left := self._those_left_are_here()) is not None:
            self._speak_once(message, left)
            self._abort(code)
        else:
            self.speak(f"rank {self.rank}: {message}")
            self._abort(code)
        self._left.set()
        self._exit = None
        raise SystemExit(code)

    def _note(self, message: str, code: int = EXIT_RANK_FAILED) -> None:
        if self.note is not None and code != SavedAndStopped.exit_code:
            self.note(code, message)

    def _everyone_is_here(self) -> bool:
        """Whether all ranks fail, within a second of each other."""
        deadline = time.monotonic() + RENDEZVOUS_S
        try:
            request = self._mpi.Ibarrier()
            while time.monotonic() < deadline:
                if request.Test():
                    return True
                time.sleep(0.005)
        except RuntimeError as error:  # MPI's: a rank has died, where that does not end the job
            if not self._is_loss(error):
                raise
        return False

    def _those_left_are_here(self) -> Any:
        """A communicator of all who live, if all of them fail within a second of each other."""
        from tf_dist.comm import survive

        if not (survive.can() and survive.dead(self._mpi)):
            return None
        try:
            survive.agree(self._mpi, True, RENDEZVOUS_S)
            return survive.shrink(self._mpi)[0]
        except (TimeoutError, RuntimeError):  # of MPI: somebody dies here as well
            return None

    def _speak_once(self, message: str, mpi: Any) -> None:
        """The lowest rank with each message says it; called by all ranks of a communicator."""
        raw = json.dumps([self.rank, message]).encode()
        everyone = [json.loads(part) for part in _allgather(mpi, raw)]
        speakers = [rank for rank, said in everyone if said == message]
        if self.rank == speakers[0]:
            who = "" if len(speakers) == len(everyone) else f"{named(speakers)}: "
            self.speak(who + message)
        mpi.Barrier()

    def _abort(self, code: int) -> NoReturn:
        _flush()
        # Not beside a main thread that is inside MPI: Open MPI's Abort then crashes now and then. A launcher
        # ends the job as well when a process exits with a status and without having left MPI.
        if self._mpi is not None and threading.current_thread() is threading.main_thread():
            self._leave_it_to_the_first(code)
            self._mpi.Abort(code)
        os._exit(code)

    def _leave_it_to_the_first(self, code: int) -> None:
        """Where a rank has died, all others meet it, and abort, at the same moment: only one of them should.

        With `--with-ft ulfm`, Open MPI's mpirun hangs or crashes when several do.
        """
        from tf_dist.comm import survive

        gone = survive.dead(self._mpi) if survive.can() else []
        if gone and any(rank not in gone for rank in range(self.rank)):
            time.sleep(ABORTED_S)
            os._exit(code)

    # Leaving -------------------------------------------------------------------------------------

    def _on_exit(self, status: Any = None, /) -> NoReturn:
        self._exit = (status, "".join(traceback.format_stack()[:-1]))
        self._original_exit(status)

    def _leave(self) -> None:
        """At exit of the interpreter, before MPI is finalized."""
        try:
            if not self._left.is_set():
                self._leave_together()
        finally:
            if self.watchdog is not None:
                self.watchdog.stop()

    def _leave_together(self) -> None:
        status, stack = self._exit or (0, "")
        self._left.set()
        if self._mpi is None:
            return
        if status not in (0, None) and not self._everyone_is_here():
            self.speak(f"rank {self.rank} called sys.exit({status!r}) while other ranks go on:\n{stack}")
            self._note(f"sys.exit({status!r})")
            self._abort(EXIT_RANK_FAILED)
        if self._watcher.is_alive():
            self._watcher.join()
            self._send_notes(stack)
        if self.watchdog is not None:
            self.watchdog.settle()
        if self._comm is not None:
            self._comm.record.waiting = (AT_THE_END, time.monotonic())
        # Into MPI's finalization together: should the job be aborted while some ranks wait there for the
        # others, Open MPI's mpirun may crash, and its exit code would be lost.
        from tf_dist.comm import survive

        if survive.can():
            self._leave_the_dead_behind(status)
            return
        request = self._leaving.Ibarrier()
        while not request.Test():
            time.sleep(0.01)

    def _is_loss(self, error: BaseException) -> bool:
        from tf_dist.comm.survive import is_loss

        return is_loss(error, self._mpi)

    def _leave_the_dead_behind(self, status: Any) -> None:
        """Wait for all who live; if somebody has died, end: MPI's finalize may wait for him for ever."""
        from tf_dist.comm import survive

        some_died = False
        while not survive.agree(self._leaving, True):
            self._leaving, _ = survive.shrink(self._leaving)
            some_died = True
        if some_died:
            _flush()
            os._exit(status if isinstance(status, int) else int(status is not None))

    def _send_notes(self, stack: str) -> None:
        """Tell rank 0 that this rank has left; rank 0 tells everyone: 2(R - 1) notes in all."""
        note = json.dumps({"rank": self.rank, "stack": stack[-4000:]}).encode()
        for other in range(self._mpi.Get_size()) if self.rank == 0 else [0]:
            if other not in (self.rank, *self._dead):
                self._mpi.Isend(bytearray(note), dest=other, tag=NOTE_TAG).Free()

    def _watch(self) -> None:
        departed: dict[int, tuple[float, str]] = {}
        while not self._left.wait(LOOK_EVERY_S):
            note = self._receive_note()
            if note:
                departed[note["rank"]] = (time.monotonic(), note["stack"])
            waiting = self._comm.waiting if self._comm else None
            if departed and waiting:
                self._end_if_stuck(departed, waiting)

    def _receive_note(self) -> dict[str, Any] | None:
        from mpi4py import MPI

        status = MPI.Status()
        try:
            if not self._mpi.Iprobe(MPI.ANY_SOURCE, NOTE_TAG, status):
                return None
        except MPI.Exception as error:
            if not self._is_loss(error):
                raise
            self._take_note_of_the_dead()
            return None
        raw = bytearray(status.Get_count(MPI.BYTE))
        self._mpi.Recv(raw, source=status.Get_source(), tag=NOTE_TAG)
        return dict(json.loads(raw))

    def _take_note_of_the_dead(self) -> None:
        """Whoever has died leaves no note; others may still."""
        from tf_dist.comm.survive import dead

        self._dead = dead(self._mpi)
        self._mpi.Ack_failed()

    def _end_if_stuck(self, departed: dict[int, tuple[float, str]], waiting: tuple[str, float]) -> None:
        verb, since = waiting
        rank, (left_at, stack) = next(iter(departed.items()))
        # When rank 0 has left, all the others know: the lowest of them speaks, and the job ends with it.
        gone = {*departed, *self._dead}
        speaker = min(other for other in range(self._mpi.Get_size()) if other not in gone)
        patience = GRACE_S if self.rank == speaker else GRACE_S + RENDEZVOUS_S
        if time.monotonic() - max(since, left_at) < patience:
            return
        self._note(f"rank {rank} left the job")
        how = f"called sys.exit:\n{stack}" if stack else "has ended"
        self.speak(f"rank {rank} left the job while rank {self.rank} waits for it in {verb}. It {how}")
        self._abort(EXIT_RANK_FAILED)


def _allgather(mpi: Any, raw: bytes) -> list[bytes]:
    from tf_dist.comm.mpi import MPIComm

    return MPIComm(mpi)._allgather_bytes(raw)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
