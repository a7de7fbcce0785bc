"""How a job ends: all ranks together, with one message, and without waiting forever.

Under plain ``mpirun`` a rank that raises leaves the others inside a collective for good. `JobExit`
makes three promises:

* An uncaught error on *every* rank (bad flags, a missing file) is printed once and ends the job with
  that error's exit code.
* An uncaught error, or ``sys.exit`` with a status, on *some* ranks is printed by those ranks with its
  traceback, and the whole job is aborted with exit code 70 (or the code of a `TfDistError`).
* A rank that simply exits, while another waits for it in a collective, is named and the job is
  aborted with exit code 70.

`tf_dist.comm.health.watchdog` handles ranks that neither fail nor exit, and do not arrive.

The ranks use a communicator of their own, so nothing here disturbs the training.
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
from tf_dist.comm.formatting import named
from tf_dist.comm.health.hang_detector import AT_THE_END
from tf_dist.comm.runtime import console as output
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import SavedAndStopped, TfDistError, behind, of_memory

if TYPE_CHECKING:
    from tf_dist.comm.health.watchdog import Watchdog

# How long a failing rank waits for the others to fail too, before it reports alone.
RENDEZVOUS_S = 1.0
# How often rank 0 (or, after it has exited, every rank) looks for exit notes.
LOOK_EVERY_S = 0.25
# How long a collective may still take after a rank has exited: earlier messages of it may be in flight.
GRACE_S = 2.0
# How long a rank waits for another one's abort to end it, where it must not abort itself.
ABORTED_S = 10.0
NOTE_TAG = 7
EXIT_RANK_FAILED = TfDistError.exit_code
# Exit code of Ctrl-C in shells.
INTERRUPTED = 130


class JobExit:
    """Installs the exit hooks; created once, by ``connect()``. Single-process until `join` is called."""

    def __init__(self) -> None:
        self._mpi: Any = None
        self.rank = 0
        # Ranks above 0 later redirect stdout and stderr to a log file; final messages go to the terminal.
        _open_streams()
        self._consoles = [os.fdopen(os.dup(2), "w", buffering=1, errors="replace")]
        self._comm: Comm | None = None
        self._together: list[Comm] = []
        self._dead: list[int] = []
        self._exit: tuple[Any, str] | None = None
        # Called with exit code and message on a rank that fails, before it ends.
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
        """Undo the hooks in a process forked by a rank: it is no rank, and may exit freely."""
        self._mpi, self._comm, self.note, self.watchdog = None, None, None, None
        self._left.set()
        self._exit = None
        sys.excepthook, threading.excepthook = self._on_exception_of_child, self._thread_excepthook
        atexit.register(self._end_child)

    def _on_exception_of_child(self, *error: Any) -> None:
        self._exit = (1, "")
        self._excepthook(*error)

    def _end_child(self) -> None:
        """Exit before mpi4py finalizes MPI: it belongs to the parent rank, and would wait for all others."""
        status = self._exit[0] if self._exit else None
        if isinstance(status, str):
            terminal.write_error(status)
        _flush()
        os._exit(status if isinstance(status, int) else int(status is not None))

    def join(self, mpi: Any, can_watch: bool) -> None:
        """Connect to the other ranks; once.

        Args:
            mpi: a communicator of all ranks, used by nothing else.
            can_watch: whether MPI may be called from a second thread.
        """
        if self._mpi is not None:
            return
        self._mpi, self.rank = mpi, mpi.Get_rank()
        self._leaving = mpi.Dup()
        if can_watch:
            self._watcher.start()

    def watch(self, comm: Comm) -> None:
        """Set the Comm whose collectives must not wait for a rank that has exited."""
        self._comm = comm

    def is_together(self, comm: Comm) -> None:
        """Set the ranks with which this one trains."""
        if not any(known is comm for known in self._together):
            self._together.append(comm)

    def members(self) -> set[int]:
        """The ranks that this one may wait for, by their rank in the job; empty: all of them.

        If a script has split the ranks, the other groups train something else and are ignored.
        """
        if not all(comm.origin for comm in self._together):
            return set()
        return {rank for comm in self._together for rank in comm.origin}

    def speak(self, text: str) -> None:
        """Print on the terminal, from any rank; does nothing if the terminal is closed."""
        for console in self._consoles:
            terminal.write(text.removesuffix("\n"), console)

    def end(self, message: str, code: int = EXIT_RANK_FAILED) -> NoReturn:
        """End the job with a message from the calling thread, whatever the main thread is doing."""
        self._note(message, code)
        self.speak(f"error: {message}")
        self._abort(code)

    def bypass_launcher(self) -> None:
        """Bypass mpirun for later messages: once it is told to end, it forwards no output of its ranks.

        Reopens the launcher's stderr where /proc shows it: a terminal, a pipe or a file of this user.
        """
        above = processes.launcher_above(os.getpid())
        if above is None or above.name not in processes.MPIRUNS:
            return
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
            stderr = os.open(f"/proc/{above.pid}/fd/2", flags)
            os.set_blocking(stderr, True)
            past = os.fdopen(stderr, "w", buffering=1, errors="replace")
            # mpirun may later overwrite this position in a file: so the message is printed twice.
            self._consoles = [past] + self._consoles * stat.S_ISREG(os.fstat(stderr).st_mode)

    # Errors --------------------------------------------------------------------------------------

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if is_interactive():  # a typo must not end the session
            self._excepthook(kind, error, trace)
            return
        error = of_memory(behind(error))
        foreseen = isinstance(error, TfDistError)
        message = f"error: {error}" if foreseen else "".join(traceback.format_exception(kind, error, trace))
        code = error.exit_code if isinstance(error, TfDistError) else EXIT_RANK_FAILED
        self._fail(message, INTERRUPTED if isinstance(error, KeyboardInterrupt) else code)

    def _on_thread_exception(self, arguments: threading.ExceptHookArgs) -> None:
        if is_interactive() or arguments.exc_type is SystemExit:  # ends only the thread
            self._thread_excepthook(arguments)
            return
        lines = traceback.format_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
        name = arguments.thread.name if arguments.thread else "?"
        self._note(lines[-1])
        self.speak(f"rank {self.rank}, thread {name}:\n" + "".join(lines))
        self._abort(EXIT_RANK_FAILED)

    def _fail(self, message: str, code: int) -> NoReturn:
        """Report once, and end the job."""
        _flush()
        self._note(message, code)
        if self._mpi is None:
            self.speak(message)
        elif self._all_fail():
            self._print_once(message, self._mpi)
        elif (left := self._survivors_fail()) is not None:
            self._print_once(message, left)
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

    def _all_fail(self) -> bool:
        """Whether all ranks fail within a second of each other."""
        deadline = time.monotonic() + RENDEZVOUS_S
        try:
            request = self._mpi.Ibarrier()
            while time.monotonic() < deadline:
                if request.Test():
                    return True
                time.sleep(0.005)
        except RuntimeError as error:  # from MPI: a rank has failed, under ULFM
            if not self._is_loss(error):
                raise
        return False

    def _survivors_fail(self) -> Any:
        """A communicator of the surviving ranks, if all of them fail within a second of each other."""
        from tf_dist.comm.transport import ulfm

        if not (ulfm.can() and ulfm.dead(self._mpi)):
            return None
        try:
            ulfm.agree(self._mpi, True, RENDEZVOUS_S)
            return ulfm.shrink(self._mpi)[0]
        except (TimeoutError, RuntimeError):  # from MPI: another rank failed meanwhile
            return None

    def _print_once(self, message: str, mpi: Any) -> None:
        """Print each distinct message on its lowest rank; called by all ranks of a communicator."""
        raw = json.dumps([self.rank, message]).encode()
        everyone = [json.loads(part) for part in _allgather(mpi, raw)]
        speakers = [rank for rank, said in everyone if said == message]
        if self.rank == speakers[0]:
            who = "" if len(speakers) == len(everyone) else f"{named(speakers)}: "
            self.speak(who + message)
        mpi.Barrier()

    def _abort(self, code: int) -> NoReturn:
        _flush()
        # Not while the main thread is inside MPI: Open MPI's Abort then crashes occasionally. A launcher also
        # ends the job when a process exits with a status before it has finalized MPI.
        if self._mpi is not None and threading.current_thread() is threading.main_thread():
            self._let_one_abort(code)
            self._mpi.Abort(code)
        self._notify_others(code)
        os._exit(code)

    def _notify_others(self, code: int) -> None:
        """Notify the other ranks, from a thread, if mpirun tolerates the exit of a process."""
        from tf_dist.comm.transport import ulfm

        if self._mpi is None or not ulfm.can() or not self._watcher.is_alive():
            return
        note, sent = json.dumps({"end": code}).encode(), []
        with contextlib.suppress(RuntimeError):  # from MPI: some have failed already
            for other in range(self._mpi.Get_size()):
                if other not in (self.rank, *self._dead):
                    sent.append(self._mpi.Isend(bytearray(note), dest=other, tag=NOTE_TAG))
            deadline = time.monotonic() + RENDEZVOUS_S
            while not all(request.Test() for request in sent) and time.monotonic() < deadline:
                time.sleep(0.01)

    def _let_one_abort(self, code: int) -> None:
        """After a failure, which all survivors see at the same moment, let only one of them abort.

        With `--with-ft ulfm`, Open MPI's mpirun hangs or crashes when several ranks abort.
        """
        from tf_dist.comm.transport import ulfm

        gone = ulfm.dead(self._mpi) if ulfm.can() else []
        if gone and any(rank not in gone for rank in range(self.rank)):
            time.sleep(ABORTED_S)
            os._exit(code)

    # Normal exit -----------------------------------------------------------------------------------

    def _on_exit(self, status: Any = None, /) -> NoReturn:
        self._exit = (status, "".join(traceback.format_stack()[:-1]))
        self._original_exit(status)

    def _leave(self) -> None:
        """Interpreter exit, before MPI is finalized."""
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
        if status not in (0, None) and not self._all_fail():
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
        # Enter MPI_Finalize together: if the job is aborted while some ranks wait there for the others, Open
        # MPI's mpirun may crash, and its exit code would be lost.
        from tf_dist.comm.transport import ulfm

        if ulfm.can():
            self._wait_for_survivors(status)
            return
        request = self._leaving.Ibarrier()
        while not request.Test():
            time.sleep(0.01)

    def _is_loss(self, error: BaseException) -> bool:
        from tf_dist.comm.transport.ulfm import is_loss

        return is_loss(error, self._mpi)

    def _wait_for_survivors(self, status: Any) -> None:
        """Wait for the surviving ranks; if a rank failed, exit now: MPI_Finalize may wait for it forever."""
        from tf_dist.comm.transport import ulfm

        some_died = False
        while not ulfm.agree(self._leaving, True, meanwhile=self._end_if_notified):
            self._leaving, _ = ulfm.shrink(self._leaving)
            some_died = True
        if some_died:
            _flush()
            os._exit(status if isinstance(status, int) else int(status is not None))

    def _send_notes(self, stack: str) -> None:
        """Notify rank 0 that this rank has exited; rank 0 forwards to all: 2(R - 1) notes in total."""
        note = json.dumps({"rank": self.rank, "stack": stack[-4000:]}).encode()
        for other in range(self._mpi.Get_size()) if self.rank == 0 else [0]:
            if other not in (self.rank, *self._dead):
                self._mpi.Isend(bytearray(note), dest=other, tag=NOTE_TAG).Free()

    def _watch(self) -> None:
        departed: dict[int, tuple[float, str]] = {}
        while not self._left.wait(LOOK_EVERY_S):
            note = self._end_if_notified()
            if note:
                departed[note["rank"]] = (time.monotonic(), note["stack"])
            waiting = self._comm.waiting if self._comm else None
            if departed and waiting:
                self._end_if_stuck(departed, waiting)

    def _end_if_notified(self) -> dict[str, Any] | None:
        """Look for a note; exit if another rank reports that it has ended the job."""
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
            self._record_failed_ranks()
            return None
        raw = bytearray(status.Get_count(MPI.BYTE))
        self._mpi.Recv(raw, source=status.Get_source(), tag=NOTE_TAG)
        return dict(json.loads(raw))

    def _record_failed_ranks(self) -> None:
        """Record failed ranks, which send no note; others may still."""
        from tf_dist.comm.transport.ulfm import dead

        self._dead = dead(self._mpi)
        self._mpi.Ack_failed()

    def _end_if_stuck(self, departed: dict[int, tuple[float, str]], waiting: tuple[str, float]) -> None:
        members = self.members() or set(range(self._mpi.Get_size()))
        departed = {rank: note for rank, note in departed.items() if rank in members}
        if not departed:
            return
        verb, since = waiting
        rank, (left_at, stack) = next(iter(departed.items()))
        # If rank 0 has exited, all the others know: the lowest of them reports, and ends the job.
        speaker = min(members - {*departed, *self._dead})
        patience = GRACE_S if self.rank == speaker else GRACE_S + RENDEZVOUS_S
        if time.monotonic() - max(since, left_at) < patience:
            return
        self._note(f"rank {rank} left the job")
        how = f"called sys.exit:\n{stack}" if stack else "has ended"
        self.speak(f"rank {rank} left the job while rank {self.rank} waits for it in {verb}. It {how}")
        self._abort(EXIT_RANK_FAILED)


def is_interactive() -> bool:
    """Whether this interpreter is interactive: a prompt, ``python -i``, IPython or Jupyter."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _open_streams() -> None:
    """Open closed standard streams (``>&-``): else a file or MPI connection would get their descriptors."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor


def _allgather(mpi: Any, raw: bytes) -> list[bytes]:
    from tf_dist.comm.transport.mpi import MPIComm

    return MPIComm(mpi)._allgather_bytes(raw)


def _flush() -> None:
    output.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never opened
            stream.flush()
