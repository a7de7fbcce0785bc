"""A run folder belongs to one job at a time: a second one would mix up its checkpoints and metrics.

The lock goes with the process, however it ends, so there is none that is stale. What the file says, whose it
is, is for people.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from pathlib import Path

from tf_dist.errors import LaunchError

NAME = "in-use.json"
# A job that was killed a moment ago may still be going.
GOING_S = 3.0
LOOK_EVERY_S = 0.05
# Locks that this process has, as file descriptors, by path: it does not lock itself out.
_ours: dict[Path, int] = {}


def claim(folder: Path) -> None:
    """Take a run folder for this process, until it ends.

    Raises:
        LaunchError: another process has it; named with its host and when it began.
    """
    path = (folder / NAME).resolve()
    if path in _ours and path.exists():
        return
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # kept open, for the lock goes with it
    except OSError:
        return  # said by whoever writes there next
    if not _locked(lock):
        os.close(lock)
        raise LaunchError(_whose(path, folder))
    _ours[path] = lock
    mine = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk: the lock is what counts
        os.ftruncate(lock, 0)
        os.write(lock, (json.dumps(mine) + "\n").encode())


def _locked(lock: int) -> bool:
    """Lock a file; False where another process has it, also after a while."""
    deadline = time.monotonic() + GOING_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_EVERY_S)
        except OSError:
            return True  # a file system without locks


def _whose(path: Path, folder: Path) -> str:
    try:
        whose = json.loads(path.read_text())
        who = f"process {whose['pid']} on {whose['host']}, since {whose['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"the run folder {folder} is in use by {who}. Wait for its end, end it, or choose another folder "
        "with --run-dir"
    )
