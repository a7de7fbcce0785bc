"""`Watchdog`: a thread in each rank that sees to it that nobody waits for ever, and nobody is left behind.

Four times a second it writes into its slot of the board what the rank is doing (`tf_dist.comm.slots`), and
looks at the slots of the others. Where ranks wait for one that does not come, the lowest of them names it and
says what it does (`tf_dist.comm.stalls`); all ranks write their Python stacks; after a while the job is
ended, with one voice. No collective, and nothing in a training step but the numbers that `Record` keeps.
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
from tf_dist.comm.base import Comm
from tf_dist.comm.record import Pace
from tf_dist.comm.slots import GONE, Board, Pulse, private_board, shared_board
from tf_dist.comm.stalls import Condition, Limits, Seen, Stall, judged, told, who
from tf_dist.comm.stragglers import Straggler, Stragglers
from tf_dist.terminal import printable
from tf_dist.untrusted_files import append, opened_to_append

if TYPE_CHECKING:
    from tf_dist.comm.post import Post

BEAT_S = 0.25
# A thread that was not run for so long was stopped, with its rank or the whole machine: what it sees is old.
GAP_S = 3.0
# From the request for stacks until the job is ended: time to write them.
WRITING_S = 1.0
# How long the others leave it to the lowest waiting rank to end the job, or to kill the one they wait for.
FLOOR_S = 5.0
# The next warning of the same stall comes after this many times as long.
LONGER = 2.0
# Between two lines about the same straggler.
STRAGGLER_EVERY_S = 300.0
PR_SET_PDEATHSIG = 1


class JobEnd(Protocol):
    """Ends the job, and speaks for it."""

    def members(self) -> set[int]:
        """The ranks that this one may wait for, by their numbers in the job; empty: all of them."""

    def speak(self, text: str) -> None:
        """Print on the terminal."""

    def end(self, message: str) -> NoReturn:
        """End the job, with this message."""


class Watchdog:
    """Watches over one rank, and over the others from there.

    Args:
        board: slots of all ranks.
        rank: this one.
        here: ranks of its node.
        ending: speaks, and ends the job.
        post: messages to and from other nodes, on the first rank of a node.

    Attributes:
        comm: whose collectives are watched.
        limits: of waiting.
        folder: for Python stacks and what is said; None: to stderr.
        may_kill: whether ranks that hold up the others are killed in the end, for MPI lets the others go on.
        alone: whether nothing can be known of some other ranks: then nobody is judged.
        stragglers: the newest word on each slow rank.
    """

    def __init__(
        self, board: Board, rank: int, here: list[int], ending: JobEnd, post: Post | None = None
    ) -> None:
        self._board, self._rank, self._here, self._ending, self._post = board, rank, set(here), ending, post
        self.comm: Comm | None = None
        self.limits, self.may_kill, self.alone = Limits(), False, False
        self.folder: Path | None = None
        self.stragglers: dict[int, Straggler] = {}
        self._pulse = Pulse(board, rank, threading.main_thread().ident or 0)
        self._slow, self._said_slow = Stragglers(), dict[int, float]()
        self._stacks_written, self._shown_step = 0, -1
        self._beat_at = self._fresh_since = time.monotonic()
        self._warned: tuple[Stall, float] | None = None
        self._abort_at, self._dead_since = 0.0, dict[int, float]()
        self._stop = threading.Event()
        self._launcher = processes.launcher_above(os.getpid())
        self._thread = threading.Thread(target=self._run, name="tf_dist-watchdog", daemon=True)

    def start(self) -> None:
        """Begin, and die with the launcher from now on."""
        if self._launcher is not None and self._launcher.pid == os.getppid():
            die_with_parent(self._launcher.pid)
        self._thread.start()

    def settle(self) -> None:
        """The program has come to its end, and waits for the others there."""
        if self._post is not None:
            self._post.settle()

    def stop(self) -> None:
        """Look no more; MPI is about to be finalized."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(GAP_S)

    # The thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            self.beat()

    def beat(self) -> None:
        """Write, exchange, and look once."""
        now = time.monotonic()
        if now - self._beat_at > GAP_S:
            self._fresh_since = now
        self._beat_at = now
        if self.comm is not None:
            self._pulse.beat(self.comm.record)
        if self._post is not None:
            self._post.exchange()
        if self._board.stacks_wanted > self._stacks_written:
            self._stacks_written = self._board.stacks_wanted
            self._write_stacks()
        if self._launcher is not None and not _lives(self._launcher):
            name, pid = self._launcher.name, self._launcher.pid
            self._ending.end(f"{name} (pid {pid}), which started this rank, is gone")
        if self.comm is not None and self.comm.size > 1 and not self.alone:
            self._look(self.comm, now)

    def _members(self, comm: Comm) -> list[int]:
        """The ranks that belong together still: some may have died, and the others gone on."""
        apart = self._ending.members()
        return sorted(apart) or list(comm.origin) or list(range(len(self._board.slots)))

    def _look(self, comm: Comm, now: float) -> None:
        members = self._members(comm)
        least = min([limit for limit in self.limits if limit] or [float("inf")])
        since = [float(at) for at in self._board.slots["since"][members] if at]
        stall = None
        if since and now - max(min(since), self._fresh_since) >= least:
            stall = judged([self.seen(rank, now) for rank in members])
        if stall is not None and self._ending.members() and stall.is_the_end():
            stall = None  # others have not ended yet, and are nobody's business
        if stall is not None and self._is_being_ended(stall, now):
            return
        if stall is not None and stall.first.waited_s >= least:
            self._act(stall, now)
        else:
            self._look_who_is_slow(members)
            self._over(now)

    def _is_being_ended(self, stall: Stall, now: float) -> bool:
        """Whether somebody has died just now: the launcher ends the job, or MPI tells the others."""
        dead = [seen.rank for seen, kind in stall.culprits if kind is Condition.DEAD]
        self._dead_since = {rank: self._dead_since.get(rank, now) for rank in dead}
        return any(now - since < FLOOR_S for since in self._dead_since.values())

    def seen(self, rank: int, now: float) -> Seen:
        """A rank, as this one sees it."""
        slot, here = self._board.slots[rank].copy(), rank in self._here
        if here:
            process = processes.state_of(int(slot["pid"]), int(slot["started"]))
        else:
            process = "" if slot["process"] == GONE else slot["process"].decode() or processes.UNKNOWN
        since = float(slot["since"])
        return Seen(
            rank, slot["host"].decode(errors="replace"), int(slot["pid"]), here, process,
            silent_s=max(0.0, now - max(float(slot["beat_at"]), self._fresh_since)),
            verb=slot["verb"].decode(errors="replace"),
            waited_s=max(0.0, now - max(since, self._fresh_since)) if since else 0.0,
            step=int(slot["step"]), steps=int(slot["steps"]), cpu_share=float(slot["cpu_share"]),
            where=slot["where"].decode(errors="replace"),
        )  # fmt: skip

    # A stall ---------------------------------------------------------------------------------------

    def _act(self, stall: Stall, now: float) -> None:
        warn_s, abort_s = self.limits
        mine, waited_s = stall.speaker == self._rank, stall.first.waited_s
        if warn_s and waited_s >= warn_s and mine and self._is_news(stall):
            self._warned = stall, waited_s
            self._board.want_stacks(self._board.stacks_wanted + 1)
            self._say(f"warning: {told(stall)}{self._outlook(stall)}")
        if not abort_s or waited_s < abort_s or not stall.may_end_the_job():
            self._abort_at = 0.0
            return
        if not self._abort_at:
            self._abort_at = now + WRITING_S + (0.0 if mine else FLOOR_S)
            self._board.want_stacks(self._board.stacks_wanted + int(mine))
        elif now >= self._abort_at and any(seen.rank == self._rank for seen in stall.waiters):
            self._end_of_patience(stall, now)

    def _is_news(self, stall: Stall) -> bool:
        if self._warned is None or self._warned[0].key != stall.key:
            return True
        return stall.first.waited_s >= LONGER * self._warned[1]

    def _outlook(self, stall: Stall) -> str:
        """What becomes of it, and where more is to be read."""
        stacks = f". Python stacks: {self.folder}/stacks-rank-*.txt" if self.folder else ""
        if not self.limits.abort_s:
            return stacks
        if not stall.may_end_the_job():
            return f". It is given time{stacks}"
        if self.may_kill:
            return f". It is killed after {self.limits.abort_s:g} s{stacks}"
        return f". The job ends after {self.limits.abort_s:g} s{stacks}"

    def _end_of_patience(self, stall: Stall, now: float) -> None:
        """Kill the ranks of this node that hold up the others, where these can go on; else end the job."""
        if self.may_kill:
            near = [seen for seen, kind in stall.culprits if seen.here and kind is not Condition.DEAD]
            if near and min(seen.rank for seen in stall.waiters if seen.here) == self._rank:
                self._say(f"{told(stall)}. Killed, so that the others can go on")
                for seen in near:
                    os.kill(seen.pid, signal.SIGKILL)
                self._fresh_since, self._abort_at, self._warned = now, 0.0, None
                return
            if now < self._abort_at + FLOOR_S:  # somebody nearer may do so
                return
        text = f"{told(stall)}. It was waited for as long as --stall-abort says ({self.limits.abort_s:g} s)"
        self._say(text, aloud=False)
        self._ending.end(text)

    def _over(self, now: float) -> None:
        """Say that a stall is over, once, if this rank spoke of it."""
        self._abort_at = 0.0
        if self._warned is None:
            return
        (_, waited_s), self._warned = self._warned, None
        self._say(f"the ranks go on, after they have waited for more than {waited_s:.0f} s")

    def _say(self, text: str, aloud: bool = True) -> None:
        """A line on the terminal, and in the log of this rank."""
        if aloud:
            self._ending.speak(text)
        if self.folder is not None:
            _append(self.folder / f"rank-{self._rank:04d}.log", text + "\n")

    def _write_stacks(self) -> None:
        """The Python stacks of all threads of this rank, by itself: no other process can see them."""
        try:
            if self.folder is None:
                # Of a rank that waits it is no news, nor is it twice for one step.
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
        except (OSError, ValueError):  # a full disk, a closed stream: there are other things to do
            pass

    # Stragglers ------------------------------------------------------------------------------------

    def _look_who_is_slow(self, members: list[int]) -> None:
        if self._rank != members[0]:
            return
        rows = self._board.slots[members]
        paces = {
            rank: Pace(int(row["steps"]), float(row["own_s"]), int(row["units"]))
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
    """One for this rank; a collective.

    Args:
        mpi: the module; None where there is none.
        size: ranks of the job.
        ending: of this rank.
    """
    if size == 1:
        return Watchdog(private_board(1), 0, [0], ending)
    from tf_dist.comm import survive
    from tf_dist.comm.post import Post, nodes_of

    everyone = mpi.COMM_WORLD.Dup()
    node, rank = everyone.Split_type(mpi.COMM_TYPE_SHARED), everyone.Get_rank()
    nodes = nodes_of(everyone, node)
    here = next(ranks for ranks in nodes if rank in ranks)
    board = shared_board(node, size)
    post = None
    if board is not None and len(nodes) > 1 and rank == here[0] and mpi.Query_thread() == mpi.THREAD_MULTIPLE:
        post = Post(everyone, board, nodes)
    made = Watchdog(board or private_board(size), rank, here, ending, post)
    made.alone = board is None or (len(nodes) > 1 and mpi.Query_thread() < mpi.THREAD_MULTIPLE)
    made.may_kill = survive.can()
    return made


def _lives(process: processes.Process) -> bool:
    return processes.state_of(process.pid, process.started) not in ("", "Z")


def _append(path: Path, text: str) -> None:
    try:
        append(path, printable(text).encode())
    except OSError:
        pass


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent is gone, also while it is stopped (Linux)."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it went just before
        os.kill(os.getpid(), signal.SIGKILL)
