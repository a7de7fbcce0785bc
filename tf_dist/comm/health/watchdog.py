"""`Watchdog`: a thread in each rank that ensures that no rank waits forever, or outlives the launcher.

Four times a second it writes what its rank is doing to the status board (`tf_dist.comm.health.status_board`),
and reads the slots of the others. If ranks wait for one that does not arrive, the lowest waiting rank names
it and reports its state (`tf_dist.comm.health.hang_detector`); all ranks write their Python stacks; after the
limit one rank ends the job. It uses no collective, and adds nothing to a training step but the numbers that
`CommTimers` stores.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from tf_dist import processes
from tf_dist.comm.health.hang_detector import Condition, Hang, Limits, PeerStatus, detect_hang, told, who
from tf_dist.comm.health.status_board import GONE, Heartbeat, StatusBoard, private_board, shared_board
from tf_dist.comm.health.stragglers import Straggler, Stragglers
from tf_dist.comm.timers import WorkRate
from tf_dist.comm.transport.base import Comm
from tf_dist.terminal import printable
from tf_dist.untrusted_files import append, opened_to_append

if TYPE_CHECKING:
    from tf_dist.comm.health.board_sync import BoardSync

BEAT_S = 0.25
# A thread that did not run for this long was suspended, with its rank or the machine: what it sees is stale.
GAP_S = 3.0
# Between the request for stacks and the end of the job: time to write them.
WRITING_S = 1.0
# How long other ranks wait for the lowest waiting rank to end the job, or to kill the culprit.
FLOOR_S = 5.0
# Factor by which the interval between warnings about the same hang grows.
LONGER = 2.0
# Between two lines about the same straggler.
STRAGGLER_EVERY_S = 300.0
PR_SET_PDEATHSIG = 1


class JobEnd(Protocol):
    """Ends the job, and reports for it."""

    def members(self) -> set[int]:
        """The ranks that this one may wait for, by their rank in the job; empty: all of them."""

    def speak(self, text: str) -> None:
        """Print on the terminal."""

    def end(self, message: str) -> NoReturn:
        """End the job, with this message."""


class Watchdog:
    """Watches this rank, and the others from here.

    Args:
        board: slots of all ranks.
        rank: this one.
        here: ranks of its node.
        ending: prints messages, and ends the job.
        post: exchange with other nodes, on the first rank of a node.

    Attributes:
        comm: whose collectives are watched.
        limits: of waiting.
        folder: for Python stacks and messages; None: stderr.
        may_kill: whether ranks that hold up the others are killed at the limit, as MPI lets the others
            continue.
        alone: whether some other ranks are invisible: then no rank is judged.
        stragglers: the newest report on each slow rank.
    """

    def __init__(
        self, board: StatusBoard, rank: int, here: list[int], ending: JobEnd, post: BoardSync | None = None
    ) -> None:
        self._board, self._rank, self._here, self._ending, self._post = board, rank, set(here), ending, post
        self.comm: Comm | None = None
        self.limits, self.may_kill, self.alone = Limits(), False, False
        self.folder: Path | None = None
        self.stragglers: dict[int, Straggler] = {}
        self._pulse = Heartbeat(board, rank, threading.main_thread().ident or 0)
        self._slow, self._said_slow = Stragglers(), dict[int, float]()
        self._stacks_written, self._shown_step = 0, -1
        self._beat_at = self._fresh_since = time.monotonic()
        self._warned: tuple[Hang, float] | None = None
        self._abort_at, self._dead_since = 0.0, dict[int, float]()
        self._stop = threading.Event()
        self._launcher = processes.launcher_above(os.getpid())
        self._thread = threading.Thread(target=self._run, name="tf_dist-watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread; from now on this process dies with the launcher."""
        if self._launcher is not None and self._launcher.pid == os.getppid():
            die_with_parent(self._launcher.pid)
        self._thread.start()

    def settle(self) -> None:
        """Note that the program has ended, and waits for the other ranks."""
        if self._post is not None:
            self._post.settle()

    def stop(self) -> None:
        """Stop watching: MPI is about to be finalized."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(GAP_S)

    # The thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            self.beat()

    def beat(self) -> None:
        """Write, exchange, and check once."""
        now = time.monotonic()
        if now - self._beat_at > GAP_S:
            self._fresh_since = now
        self._beat_at = now
        if self.comm is not None:
            self._pulse.beat(self.comm.record)
        if self._post is not None:
            self._post.exchange()
        if self._board.stacks_requested > self._stacks_written:
            self._stacks_written = self._board.stacks_requested
            self._write_stacks()
        if self._launcher is not None and not _lives(self._launcher):
            name, pid = self._launcher.name, self._launcher.pid
            self._ending.end(f"{name} (pid {pid}), which started this rank, is gone")
        if self.comm is not None and self.comm.size > 1 and not self.alone:
            self._look(self.comm, now)

    def _members(self, comm: Comm) -> list[int]:
        """The ranks that still belong together: some may have failed, and the others continued."""
        apart = self._ending.members()
        return sorted(apart) or list(comm.origin) or list(range(len(self._board.slots)))

    def _look(self, comm: Comm, now: float) -> None:
        members = self._members(comm)
        least = min([limit for limit in self.limits if limit] or [float("inf")])
        since = [float(at) for at in self._board.slots["since"][members] if at]
        stall = None
        if since and now - max(min(since), self._fresh_since) >= least:
            stall = detect_hang([self.seen(rank, now) for rank in members])
        if stall is not None and self._ending.members() and stall.all_at_the_end():
            stall = None  # ranks of other groups have not ended yet, which does not matter here
        if stall is not None and self._is_being_ended(stall, now):
            return
        if stall is not None and stall.first.waited_s >= least:
            self._act(stall, now)
        else:
            self._report_stragglers(members)
            self._over(now)

    def _is_being_ended(self, stall: Hang, now: float) -> bool:
        """Whether a rank failed just now: the launcher ends the job, or MPI raises errors on the others."""
        dead = [seen.rank for seen, kind in stall.culprits if kind is Condition.DEAD]
        self._dead_since = {rank: self._dead_since.get(rank, now) for rank in dead}
        return any(now - since < FLOOR_S for since in self._dead_since.values())

    def seen(self, rank: int, now: float) -> PeerStatus:
        """The status of a rank, as this one sees it."""
        slot, here = self._board.slots[rank].copy(), rank in self._here
        if here:
            process = processes.state_of(int(slot["pid"]), int(slot["started"]))
        else:
            process = "" if slot["process"] == GONE else slot["process"].decode() or processes.UNKNOWN
        since = float(slot["since"])
        return PeerStatus(
            rank, slot["host"].decode(errors="replace"), int(slot["pid"]), here, process,
            silent_s=max(0.0, now - max(float(slot["beat_at"]), self._fresh_since)),
            verb=slot["verb"].decode(errors="replace"),
            waited_s=max(0.0, now - max(since, self._fresh_since)) if since else 0.0,
            step=int(slot["step"]), steps=int(slot["steps"]), cpu_share=float(slot["cpu_share"]),
            where=slot["where"].decode(errors="replace"),
        )  # fmt: skip

    # A hang ----------------------------------------------------------------------------------------

    def _act(self, stall: Hang, now: float) -> None:
        warn_s, abort_s = self.limits
        mine, waited_s = stall.speaker == self._rank, stall.first.waited_s
        if warn_s and waited_s >= warn_s and mine and self._is_news(stall):
            self._warned = stall, waited_s
            self._board.request_stacks(self._board.stacks_requested + 1)
            self._say(f"warning: {told(stall)}{self._outlook(stall)}")
        if not abort_s or waited_s < abort_s or not stall.may_abort():
            self._abort_at = 0.0
            return
        if not self._abort_at:
            self._abort_at = now + WRITING_S + (0.0 if mine else FLOOR_S)
            self._board.request_stacks(self._board.stacks_requested + int(mine))
        elif now >= self._abort_at and any(seen.rank == self._rank for seen in stall.waiters):
            self._act_at_the_limit(stall, now)

    def _is_news(self, stall: Hang) -> bool:
        if self._warned is None or self._warned[0].key != stall.key:
            return True
        return stall.first.waited_s >= LONGER * self._warned[1]

    def _outlook(self, stall: Hang) -> str:
        """What happens next, and where details are."""
        stacks = f". Python stacks: {self.folder}/stacks-rank-*.txt" if self.folder else ""
        if not self.limits.abort_s:
            return stacks
        if not stall.may_abort():
            return f". It is given time{stacks}"
        if self.may_kill:
            return f". It is killed after {self.limits.abort_s:g} s{stacks}"
        return f". The job ends after {self.limits.abort_s:g} s{stacks}"

    def _act_at_the_limit(self, stall: Hang, now: float) -> None:
        """Kill the ranks of this node that hold up the others, if those can continue; else end the job."""
        if self.may_kill:
            near = [seen for seen, kind in stall.culprits if seen.here and kind is not Condition.DEAD]
            if near and min(seen.rank for seen in stall.waiters if seen.here) == self._rank:
                self._say(f"{told(stall)}. Killed, so that the others can go on")
                for seen in near:
                    os.kill(seen.pid, signal.SIGKILL)
                self._fresh_since, self._abort_at, self._warned = now, 0.0, None
                return
            if now < self._abort_at + FLOOR_S:  # a rank nearer to it may do so
                return
        text = f"{told(stall)}. It was waited for as long as --stall-abort says ({self.limits.abort_s:g} s)"
        self._say(text, aloud=False)
        self._ending.end(text)

    def _over(self, now: float) -> None:
        """Report the end of a hang, once, if this rank reported the hang."""
        self._abort_at = 0.0
        if self._warned is None:
            return
        (_, waited_s), self._warned = self._warned, None
        self._say(f"the ranks go on, after they have waited for more than {waited_s:.0f} s")

    def _say(self, text: str, aloud: bool = True) -> None:
        """Print a line on the terminal, and in the log of this rank."""
        if aloud:
            self._ending.speak(text)
        if self.folder is not None:
            _append(self.folder / f"rank-{self._rank:04d}.log", text + "\n")

    def _write_stacks(self) -> None:
        """Write the Python stacks of all threads of this rank: no other process can read them."""
        try:
            if self.folder is None:
                # Stacks of a rank that waits are uninteresting, and so is a second dump of the same step.
                record = self.comm.record if self.comm is not None else None
                if record is not None and not record.waiting and record.step != self._shown_step:
                    self._shown_step = record.step
                    faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
                return
            path = self.folder / f"stacks-rank-{self._rank:04d}.txt"
            with os.fdopen(opened_to_append(path), "a") as file:
                file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, pid {os.getpid()}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except (OSError, ValueError):  # a full disk, a closed stream: must not stop the watchdog
            pass

    # Stragglers ------------------------------------------------------------------------------------

    def _report_stragglers(self, members: list[int]) -> None:
        if self._rank != members[0]:
            return
        rows = self._board.slots[members]
        paces = {
            rank: WorkRate(int(row["steps"]), float(row["own_s"]), int(row["units"]))
            for rank, row in zip(members, rows, strict=True)
        }
        now = time.monotonic()
        for one in self._slow.look(paces):
            self.stragglers[one.rank] = one
            if now - self._said_slow.get(one.rank, -STRAGGLER_EVERY_S) >= STRAGGLER_EVERY_S:
                self._said_slow[one.rank] = now
                self._say(
                    f"{who(self.seen(one.rank, now))} is slow: it takes {one.ratio:g} times as long for a "
                    f"micro-batch as the others, who wait {one.ms:g} ms for it in each step (step {one.step})"
                )


def made(mpi: Any, size: int, ending: JobEnd) -> Watchdog:
    """Create the watchdog of this rank; a collective.

    Args:
        mpi: the module; None without MPI.
        size: ranks of the job.
        ending: of this rank.
    """
    if size == 1:
        return Watchdog(private_board(1), 0, [0], ending)
    from tf_dist.comm.health.board_sync import BoardSync, nodes_of
    from tf_dist.comm.transport import ulfm

    everyone = mpi.COMM_WORLD.Dup()
    node, rank = everyone.Split_type(mpi.COMM_TYPE_SHARED), everyone.Get_rank()
    nodes = nodes_of(everyone, node)
    here = next(ranks for ranks in nodes if rank in ranks)
    board = shared_board(node, size)
    post = None
    if board is not None and len(nodes) > 1 and rank == here[0] and mpi.Query_thread() == mpi.THREAD_MULTIPLE:
        post = BoardSync(everyone, board, nodes)
    made = Watchdog(board or private_board(size), rank, here, ending, post)
    made.alone = board is None or (len(nodes) > 1 and mpi.Query_thread() < mpi.THREAD_MULTIPLE)
    made.may_kill = ulfm.can()
    return made


def _lives(process: processes.Process) -> bool:
    return processes.state_of(process.pid, process.started) not in ("", "Z")


def _append(path: Path, text: str) -> None:
    try:
        append(path, printable(text).encode())
    except OSError:
        pass


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent has exited, even while it is stopped (Linux)."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # the parent exited before the call
        os.kill(os.getpid(), signal.SIGKILL)
