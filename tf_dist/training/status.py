"""``status.json`` of jobs that were killed: they could not say so; whoever looks next says it for them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from tf_dist.errors import TfDistError
from tf_dist.files import read_capped, write_whole
from tf_dist.training.in_use import NAME

# What a job says that is at work.
ALIVE = ("running", "stopping")
# It holds a few numbers, and the failures of one job.
LIMIT_BYTES = 1 << 20
KILLED = 137


def correct(folder: Path, ours: bool = False) -> None:
    """Let a run folder say that its job has failed, if it says that one is at work and none is.

    Where that cannot be known (no locks on this file system, no permission) nothing is changed.

    Args:
        folder: of a run, or any other.
        ours: this process has the lock of it.
    """
    path = folder / "status.json"
    with contextlib.suppress(OSError, TfDistError, ValueError, KeyError, TypeError, AttributeError):
        if path.is_symlink() or not path.is_file():
            return
        status: dict[str, Any] = json.loads(read_capped(path, LIMIT_BYTES))
        if status["state"] not in ALIVE or not (ours or _is_free(folder)):
            return
        message = "the job was ended from outside, before it could say so"
        status["failures"].append({"rank": None, "message": message, "unix_time": time.time()})
        status.update(state="failed", exit_code=status.get("exit_code") or KILLED)
        write_whole(path, (json.dumps(status, indent=1) + "\n").encode())


def _is_free(folder: Path) -> bool:
    """Whether certainly no process has the lock of a run folder."""
    try:
        lock = os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
