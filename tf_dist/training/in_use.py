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
from typing import Any

from tf_dist.errors import LaunchError

NAME = "in-use.json"
# A job that was killed a moment ago may still be going.
GOING_S = 3.0
LOOK_EVERY_S = 0.05
# Folders that this process has, by path: it does not lock itself out.
_ours: dict[Path, Any] = {}


def claim(folder: Path) -> None:
    """Take a run folder for this process, until it ends.

    Raises:
        LaunchError: another process has it; named with its host and when it began.
    """
    path = (folder / NAME).resolve()
    if path in _ours and path.exists():
        return
    try:
        file = open(path, "a+b")
    except OSError:
        return  # said by whoever writes there next
    if not _locked(file):
        raise LaunchError(_whose(path, folder))
    _ours[path] = file
    mine = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk: the lock is what counts
        file.truncate(0)
        file.write((json.dumps(mine) + "\n").encode())
        file.flush()


def _locked(file: Any) -> bool:
    """Lock a file; False where another process has it, also after a while."""
    deadline = time.monotonic() + GOING_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
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
