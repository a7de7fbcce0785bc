"""`Board`: a slot for each rank of the job, in memory that the ranks of a node share.

Every rank writes its own slot, and the first rank of a node those of ranks elsewhere, as messages bring them
(`tf_dist.comm.post`). Nobody locks anything: a reader may see a slot that is half a beat old and half new,
which matters to nobody who looks for seconds. The memory is a file without a name: it goes with the last
process.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from tf_dist import processes
from tf_dist.comm.record import Record

SLOT = np.dtype(
    [
        ("pid", np.int64),
        ("started", np.int64),  # when the process was, see `processes.Process`
        ("beats", np.int64),
        ("beat_at", np.float64),  # time.monotonic of this node, as is `since`
        ("since", np.float64),  # when it came to the collective that it is in; 0: it is in none
        ("step", np.int64),  # under way, from 1; 0: none yet
        ("steps", np.int64),  # `Pace`
        ("own_s", np.float64),
        ("units", np.int64),
        ("cpu_share", np.float64),  # of one core, lately
        ("process", "S1"),  # its state, as the first rank of its node sees it
        ("verb", "S47"),
        ("host", "S64"),
        ("where", "S160"),  # in the program: the innermost line of the main thread that is not Python's own
    ]
)
# In place of the state of a process that is gone.
GONE = b"-"
HEAD_BYTES = 64
# In names of files whose lines tell a user little: installed packages, what TensorFlow makes of functions.
NOT_A_PLACE = ("site-packages", "__autograph_generated_file")
NAME_BYTES = 256
# What our files in shared memory are called until all ranks have them open; `doctor` knows the name.
PREFIX = "tf_dist-board-"
FOLDERS = ("/dev/shm", tempfile.gettempdir())  # noqa: S108 - a name that nobody can guess, 0600
# Over how long `cpu_share` looks back at most.
LATELY_S = 10.0


class Board:
    """Slots of all ranks.

    Args:
        memory: zeros, at least `bytes_needed`.
        size: ranks of the job.

    Attributes:
        slots: (R,) of `SLOT`.
    """

    def __init__(self, memory: Any, size: int) -> None:
        self._head = np.frombuffer(memory, np.int64, HEAD_BYTES // 8)
        self.slots = np.frombuffer(memory, SLOT, size, HEAD_BYTES)

    @property
    def stacks_wanted(self) -> int:
        """How often somebody has asked all ranks for their Python stacks."""
        return int(self._head[0])

    def want_stacks(self, number: int) -> None:
        """Ask all ranks of the node, for the n-th time."""
        self._head[0] = max(int(self._head[0]), number)


def bytes_needed(size: int) -> int:
    """Memory of a board for so many ranks."""
    return HEAD_BYTES + size * SLOT.itemsize


def private_board(size: int) -> Board:
    """One that no other rank sees: there is no memory to share, or nobody to share it with."""
    return Board(bytearray(bytes_needed(size)), size)


def shared_board(node: Any, size: int) -> Board | None:
    """One of all ranks of a node; a collective.

    Args:
        node: MPI communicator of the ranks that share memory.
        size: ranks of the job.

    Returns:
        None, on all of them, where they find no memory to share.
    """
    name = np.zeros(NAME_BYTES, np.uint8)
    path = _made(bytes_needed(size)) if node.Get_rank() == 0 else None
    if path is not None:
        raw = str(path).encode()[:NAME_BYTES]
        name[: len(raw)] = np.frombuffer(raw, np.uint8)
    node.Bcast(name)
    path = Path(name.tobytes().rstrip(b"\0").decode())
    board = _opened(path, size) if path.name else None
    missing = np.array([int(board is None)], np.int64)
    sums = np.zeros_like(missing)
    node.Allreduce(missing, sums)
    if node.Get_rank() == 0 and path.name:
        path.unlink(missing_ok=True)  # all have it open: nothing can be left behind from now on
    return None if sums[0] else board


def _made(length: int) -> Path | None:
    """A new file of zeros that nobody else can open."""
    for folder in FOLDERS:
        path = Path(folder) / f"{PREFIX}{os.getuid()}-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
        try:
            os.posix_fallocate(handle, 0, length)  # memory that is not there would kill whoever writes to it
            return path
        except OSError:
            path.unlink()
        finally:
            os.close(handle)
    return None


def _opened(path: Path, size: int) -> Board | None:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return Board(mmap.mmap(handle, bytes_needed(size)), size)
    except (OSError, ValueError):
        return None
    finally:
        os.close(handle)


class Pulse:
    """Writes the slot of this rank.

    Args:
        board: where.
        rank: whose.
        main: identity of the main thread, whose place in the program is written.
    """

    def __init__(self, board: Board, rank: int, main: int) -> None:
        self._slot, self._main = board.slots[rank : rank + 1], main
        self._cpu: list[tuple[float, float]] = []
        own = processes.find(os.getpid())
        self._slot["pid"], self._slot["host"] = os.getpid(), socket.gethostname().encode()[:64]
        self._slot["started"] = own.started if own else 0

    def beat(self, record: Record) -> None:
        """Write what the rank is doing."""
        slot, now, waiting, pace = self._slot, time.monotonic(), record.waiting, record.pace
        slot["verb"] = waiting[0].encode(errors="replace") if waiting else b""
        slot["since"] = waiting[1] if waiting else 0.0
        slot["steps"], slot["own_s"], slot["units"] = pace
        slot["cpu_share"] = self._cpu_share(now, anew=bool(waiting) or record.step != slot["step"][0])
        slot["step"] = record.step
        slot["where"] = b"" if waiting else place_of(sys._current_frames().get(self._main)).encode()[-160:]
        slot["beat_at"] = now
        slot["beats"] += 1

    def _cpu_share(self, now: float, anew: bool) -> float:
        """Of one core, since the rank has begun with what it does, or lately; 1 where it is not known yet."""
        if anew:
            self._cpu = []
        self._cpu.append((now, time.process_time()))
        while self._cpu[1:] and self._cpu[0][0] < now - LATELY_S:
            self._cpu.pop(0)
        (begun, before), (ended, after) = self._cpu[0], self._cpu[-1]
        return (after - before) / max(ended - begun, 1e-3) if ended > begun else 1.0


def place_of(frame: FrameType | None) -> str:
    """``folder/file.py:line, in function``: the innermost that is neither Python's own nor installed."""
    innermost = frame
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(("<", sys.base_prefix)) and not any(word in file for word in NOT_A_PLACE):
            break
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return ""
    return (
        f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}, in {frame.f_code.co_name}"
    )
