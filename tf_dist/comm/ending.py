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
import contextlib
import json
import os
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from tf_dist import processes, terminal
from tf_dist.comm import output
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
# Ctrl-C, as shells count it.
INTERRUPTED = 130


class Ending:
    """Installs the hooks; made once, by ``connect()``. Alone until `join` is called."""

    def __init__(self) -> None:
        self._mpi: Any = None
        self.rank = 0
        # Ranks above 0 later send their stdout and stderr to a log file; last words go to the terminal.
        _have_streams()
        self._consoles = [os.fdopen(os.dup(2), "w", buffering=1, errors="replace")]
        self._comm: Comm | None = None
        self._together: list[Comm] = []
        self._dead: list[int] = []
        self._exit: tuple[Any, str] | None = None
        # Called with exit code and message on a rank that fails, while it still can.
        self.note: Callable[[int, str], None] | None = None
        self.watchdog: Watchdog | None = None
        self._left = threading.Event()
        self._original_exit = sys.exit
        self._excepthook, self._thread_excepthook = sys.excepthook, threading.excepthook
        sys.excepthook = self._on_exception
        threading.excepthook = self._on_thread_exception
        sys.exit = self._on_exit
        atexit.register(self._leave)
        os.register_at_fork(after_in_child=self._forget)
        self._watcher = threading.Thread(target=self._watch, name="tf_dist-ending", daemon=True)

    def _forget(self) -> None:
        """In a process that a rank has forked: it is no rank, and its end is nobody's business."""
        self._mpi, self._comm, self.note, self.watchdog = None, None, None, None
        self._left.set()
        self._exit = None
        sys.excepthook, threading.excepthook = self._on_exception_of_child, self._thread_excepthook
        atexit.register(self._end_child)

    def _on_exception_of_child(self, *error: Any) -> None:
        self._exit = (1, "")
        self._excepthook(*error)

    def _end_child(self) -> None:
        """Leave before mpi4py finalizes MPI: it is that of the rank, and would wait for all others."""
        status = self._exit[0] if self._exit else None
        if isinstance(status, str):
            terminal.write_error(status)
        _flush()
        os._exit(status if isinstance(status, int) else int(status is not None))

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

    def is_together(self, comm: Comm) -> None:
        """Name ranks with which this one trains."""
        if not any(known is comm for known in self._together):
            self._together.append(comm)

    def members(self) -> set[int]:
        """The ranks that this one may wait for, by their numbers in the job; empty: all of them.

        Where a script has divided the ranks, others train something else, and are nobody's business.
        """
        if not all(comm.origin for comm in self._together):
            return set()
        return {rank for comm in self._together for rank in comm.origin}

    def speak(self, text: str) -> None:
        """Print on the terminal, from whichever rank; in vain, where nobody listens."""
        for console in self._consoles:
            terminal.write(text.removesuffix("\n"), console)

    def end(self, message: str, code: int = EXIT_RANK_FAILED) -> NoReturn:
        """End the job, with a word of the thread that calls, whatever the main thread is doing."""
        self._note(message, code)
        self.speak(f"error: {message}")
        self._abort(code)

    def speak_past_the_launcher(self) -> None:
        """From now on: an mpirun that is told to end passes on nothing that its ranks say.

        Its stderr is opened anew where /proc shows it: a terminal, a pipe or a file of this user's.
        """
        above = processes.launcher_above(os.getpid())
        if above is None or above.name not in processes.MPIRUNS:
            return
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
            stderr = os.open(f"/proc/{above.pid}/fd/2", flags)
            os.set_blocking(stderr, True)
            past = os.fdopen(stderr, "w", buffering=1, errors="replace")
            # What mpirun writes into a file later would lie over this: so it is said twice.
            self._consoles = [past] + self._consoles * stat.S_ISREG(os.fstat(stderr).st_mode)

    # Errors --------------------------------------------------------------------------------------

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if is_interactive():  # a typo is no reason to leave
            self._excepthook(kind, error, trace)
            return
        error = of_memory(behind(error))
        foreseen = isinstance(error, TfDistError)
        message = f"error: {error}" if foreseen else "".join(traceback.format_exception(kind, error, trace))
        code = error.exit_code if isinstance(error, TfDistError) else EXIT_RANK_FAILED
        self._fail(message, INTERRUPTED if isinstance(error, KeyboardInterrupt) else code)

    def _on_thread_exception(self, arguments: threading.ExceptHookArgs) -> None:
        if is_interactive() or arguments.exc_type is SystemExit:  # with which a thread ends, and no more
            self._thread_excepthook(arguments)
            return
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
        self._tell_the_others_to_end(code)
        os._exit(code)

    def _tell_the_others_to_end(self, code: int) -> None:
        """From a thread, where mpirun takes the end of a process for a death that the others outlive."""
        from tf_dist.comm import survive

        if self._mpi is None or not survive.can() or not self._watcher.is_alive():
            return
        note, sent = json.dumps({"end": code}).encode(), []
        with contextlib.suppress(RuntimeError):  # of MPI: some are dead already
            for other in range(self._mpi.Get_size()):
                if other not in (self.rank, *self._dead):
                    sent.append(self._mpi.Isend(bytearray(note), dest=other, tag=NOTE_TAG))
            deadline = time.monotonic() + RENDEZVOUS_S
            while not all(request.Test() for request in sent) and time.monotonic() < deadline:
                time.sleep(0.01)

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
        while not survive.agree(self._leaving, True, meanwhile=self._end_if_told):
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
            note = self._end_if_told()
            if note:
                departed[note["rank"]] = (time.monotonic(), note["stack"])
            waiting = self._comm.waiting if self._comm else None
            if departed and waiting:
                self._end_if_stuck(departed, waiting)

    def _end_if_told(self) -> dict[str, Any] | None:
        """Look for a note; end where another rank has ended the job and says so."""
        note = self._receive_note()
        if note and "end" in note:
            _flush()
            os._exit(note["end"])
        return note

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
        members = self.members() or set(range(self._mpi.Get_size()))
        departed = {rank: note for rank, note in departed.items() if rank in members}
        if not departed:
            return
        verb, since = waiting
        rank, (left_at, stack) = next(iter(departed.items()))
        # When rank 0 has left, all the others know: the lowest of them speaks, and the job ends with it.
        speaker = min(members - {*departed, *self._dead})
        patience = GRACE_S if self.rank == speaker else GRACE_S + RENDEZVOUS_S
        if time.monotonic() - max(since, left_at) < patience:
            return
        self._note(f"rank {rank} left the job")
        how = f"called sys.exit:\n{stack}" if stack else "has ended"
        self.speak(f"rank {rank} left the job while rank {self.rank} waits for it in {verb}. It {how}")
        self._abort(EXIT_RANK_FAILED)


def is_interactive() -> bool:
    """Whether a person types to this interpreter: a prompt, ``python -i``, IPython or Jupyter."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _have_streams() -> None:
    """Open what was closed (``>&-``): else a file, or a connection of MPI, would take the place of stdout."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free


def _allgather(mpi: Any, raw: bytes) -> list[bytes]:
    from tf_dist.comm.mpi import MPIComm

    return MPIComm(mpi)._allgather_bytes(raw)


def _flush() -> None:
    output.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there never was one
            stream.flush()
