"""MPI startup: wait until all ranks of this node have started, and detect those that failed on the way.

`MPI_Init` waits for all ranks, and blocks all Python threads meanwhile: a rank that waits there for a failed
one can neither detect nor report it. So ranks wait before it, for those of their node, which /proc lists: a
rank counts as started once it has loaded an MPI library, whoever loads it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pwd
import signal
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import psutil

from tf_dist import processes
from tf_dist.comm.formatting import named
from tf_dist.errors import LaunchError, TfDistError

# How long ranks wait for each other to start: hundreds that read Python from one disk take minutes.
START_LIMIT_S = 600.0
# By then a launcher has started all ranks of its node.
STARTED_S = 20.0
LOOK_EVERY_S, LONGEST_PAUSE_S = 0.05, 0.5
# A younger process may not be a rank yet: it was forked, and has not called exec.
YOUNG_S = 5.0
# How long other ranks wait for the first to report, before they exit silently.
FLOOR_S = 2.0
# Variables set by Open MPI's mpirun for its ranks.
JOB, RANK, HERE = "PMIX_NAMESPACE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
LIBRARY = b"/libmpi"
# Set by a rank for its children: its process id.
MARK = "TF_DIST_RANK_PID"


def ensure_home(environment: MutableMapping[str, str]) -> None:
    """Set HOME if it is missing, as for services and cron: without it MPI_Init ends the process."""
    if environment.get("HOME"):
        return
    try:
        home = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # no such user: a container with a uid of its own
        home = ""
    environment["HOME"] = home if os.path.isdir(home) else tempfile.gettempdir()


def is_child_of_rank(environment: Mapping[str, str]) -> bool:
    """Whether a rank started this process, as ``subprocess.run([sys.executable, "evaluate.py"])``.

    It inherits the launcher's variables. If it joined as that rank, it and all others would wait forever: so
    it runs as a single process.

    Raises:
        LaunchError: multiprocessing started it, to run one function: it must not train.
    """
    pid, own = environment.get(MARK, ""), os.getpid()
    if not pid.isdigit() or int(pid) == own:
        return False
    for process in processes.ancestors(own):
        if process.pid == int(pid):
            break
        if process.name in processes.LAUNCHERS:  # the rank started a job of its own
            return False
    else:
        return False
    if multiprocessing.parent_process() is not None:
        raise LaunchError(
            "tf_dist.connect() was called in a process that multiprocessing has started in a rank. Guard "
            'what only ranks do by `if __name__ == "__main__":`'
        )
    return True


def begin_mpi(mpi: Any) -> None:
    """Initialize MPI; all ranks wait for each other.

    Raises:
        TfDistError: a rank of this node failed before it arrived here; on the first of the others.
    """
    launcher = processes.launcher_above(os.getpid())
    if launcher is not None:  # else ranks may be in containers, where /proc hides the others
        wait_for_local_ranks(os.environ, launcher.pid)
    # A rank of another node may still have failed. So exit after a while, and show where: here. Writes to the
    # descriptor: sys.stderr may be that of pytest or a notebook, which has none.
    faulthandler.dump_traceback_later(START_LIMIT_S, exit=True, file=2)
    try:
        # About a suspicious launcher: `check_launcher` is certain.
        with warnings.catch_warnings(action="ignore"), _told_to_end_later():
            mpi.Init_thread(mpi.THREAD_MULTIPLE)
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _told_to_end_later() -> Iterator[None]:
    """Delay SIGTERM: the others may wait forever for a rank that dies inside MPI_Init."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait_for_local_ranks(environment: Mapping[str, str], launcher: int) -> None:
    """Wait until all ranks of this node have loaded MPI.

    Args:
        environment: of this rank.
        launcher: the process that starts the ranks of this node.

    Raises:
        TfDistError: some have failed; on the lowest of the others. The rest exit silently.
    """
    job, count = environment.get(JOB, ""), environment.get(HERE, "")
    if not job or not count.isdigit() or int(count) < 2 or not (processes.PROC / "self" / "environ").exists():
        return
    ranks, begun, pause_s = LocalRanks(job), time.monotonic(), LOOK_EVERY_S
    while not ranks.all_here(int(count)):
        waited_s, alive = time.monotonic() - begun, ranks.alive()
        gone, too_few = ranks.gone(), waited_s > STARTED_S and len(alive) < int(count)
        if too_few and _children(launcher) >= int(count):
            return  # somebody is there whom this user may not look at
        if gone or too_few:
            _refuse(gone or _never_seen(alive, environment), int(environment[RANK]) == min(alive))
        if waited_s > START_LIMIT_S:  # leave it to MPI
            return
        time.sleep(pause_s)
        pause_s = min(LONGEST_PAUSE_S, 1.2 * pause_s)


def _children(pid: int) -> int:
    found = map(processes.find, psutil.pids())
    return sum(process is not None and process.parent == pid and process.state != "Z" for process in found)


def _never_seen(alive: Collection[int], environment: Mapping[str, str]) -> list[int]:
    """Ranks that failed before they were seen; none if the ranks of this node are not known."""
    size = environment.get("OMPI_COMM_WORLD_SIZE", "")
    return sorted(set(range(int(size))) - set(alive)) if size == environment[HERE] else []


def _refuse(gone: list[int], first: bool) -> None:
    if not first:
        time.sleep(FLOOR_S)
        os._exit(TfDistError.exit_code)
    who = named(gone) if gone else "a rank of this node"
    raise TfDistError(
        f"the job cannot begin: {who} ended before tf_dist.connect(). What was said there is above; a rank "
        "that takes no part must not be started"
    )


class LocalRanks:
    """The ranks of a job on this node, as /proc shows them; this user's processes only.

    Args:
        job: its name among all jobs of the launcher.
    """

    def __init__(self, job: str) -> None:
        self._mark = f"{JOB}={job}".encode()
        self._first_seen: dict[int, float] = {}
        self._others: set[int] = set()
        self._seen: dict[int, set[int]] = {}
        self._here: set[int] = set()

    def all_here(self, count: int) -> bool:
        """Scan once; whether ``count`` ranks have loaded MPI."""
        self._find()
        for rank, pids in self._seen.items():
            if rank not in self._here and any(self._has_loaded_mpi(pid) for pid in pids):
                self._here.add(rank)
        return len(self._here) >= count

    def alive(self) -> list[int]:
        """The ranks that have a process."""
        return [rank for rank, pids in self._seen.items() if any(map(self._lives, pids))]

    def gone(self) -> list[int]:
        """Ranks whose process has exited, ascending."""
        return sorted(self._seen.keys() - set(self.alive()))

    def _find(self) -> None:
        now, known = time.monotonic(), self._others.union(*self._seen.values())
        for pid in psutil.pids():
            if pid in known:
                continue
            rank = self._rank(pid)
            if rank is not None:
                self._seen.setdefault(rank, set()).add(pid)
            elif now - self._first_seen.setdefault(pid, now) > YOUNG_S:
                self._others.add(pid)

    def _rank(self, pid: int) -> int | None:
        """The rank of a process: its own, or that of the script that starts it."""
        words = self._read(pid, "environ").split(b"\0")
        if self._mark not in words:
            return None
        ranks = [word.partition(b"=")[2] for word in words if word.startswith(RANK.encode() + b"=")]
        return int(ranks[0]) if ranks and ranks[0].isdigit() else None

    def _has_loaded_mpi(self, pid: int) -> bool:
        return LIBRARY in self._read(pid, "maps")

    def _lives(self, pid: int) -> bool:
        return processes.state_of(pid, 0) not in ("", "Z")

    def _read(self, pid: int, name: str) -> bytes:
        try:
            return (processes.PROC / str(pid) / name).read_bytes()
        except OSError:  # another user's, or gone
            return b""
