"""A run folder belongs to one job at a time: a second one would mix up its checkpoints and metrics.

The lock is the job's, not that of one rank: the first rank takes it alone, then all ranks share it, so a
death of the first one lets nobody in while others go on. It goes with the last process of the job, however
that ends, so there is none that is stale. What the file says, whose it is, is for people.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tf_dist.errors import LaunchError
from tf_dist.untrusted_files import STATUS_LIMIT_BYTES, opened_to_lock, read_json, shown

NAME = "in-use.json"
# A job that was killed a moment ago may still be going.
GOING_S = 3.0
LOOK_EVERY_S = 0.05


class Held(NamedTuple):
    """A lock of this process. handle: open, for the lock goes with it. file, folder: device and inode."""

    handle: int
    file: tuple[int, int]
    folder: tuple[int, int]


# By the path of the file: a process does not lock itself out.
_ours: dict[Path, Held] = {}
_checking = threading.Lock()


def claim(folder: Path) -> None:
    """Take a run folder for the job of this process, on its first rank, until its last process ends.

    Raises:
        LaunchError: another job has it, named with its host and when it began; or it cannot be locked.
    """
    path = _path(folder)
    if not is_ours(folder):
        before = _ours.pop(path, None)
        if before is not None:  # of a folder of that name which is no more
            os.close(before.handle)
        _take(folder, path, GOING_S)
    mine = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk: the lock is what counts
        os.ftruncate(_ours[path].handle, 0)
        os.pwrite(_ours[path].handle, (json.dumps(mine) + "\n").encode(), 0)


def share(folder: Path) -> None:
    """Hold what the first rank of this job has claimed, on every other rank.

    Raises:
        LaunchError: another job has it, or it cannot be locked.
    """
    path = _path(folder)
    if is_ours(folder):
        return
    handle = _opened(folder, path)
    if not _locked(handle, fcntl.LOCK_SH, GOING_S):
        os.close(handle)
        raise LaunchError(_whose(path, folder))
    _remember(folder, path, handle)


def is_ours(folder: Path) -> bool:
    """Whether this process still has the folder that it has claimed, or shares."""
    held = _ours.get(_path(folder))
    return held is not None and (held.folder, held.file) == (_identity(folder), _identity(_path(folder)))


def is_free(folder: Path) -> bool:
    """Whether certainly no process has the lock of a run folder; also of one that is not ours to write."""
    path = _path(folder)
    if not os.path.lexists(path):
        return True
    try:
        handle = opened_to_lock(path)
    except OSError:
        return False
    try:
        # Alone: the ranks of a job that is at work share it.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def check(folder: Path) -> None:
    """See that the folder is there and still ours; on the first rank, before something is written.

    A lock file that somebody has removed is made again, if no other job was quicker.

    Raises:
        LaunchError: the folder is gone, or another job has it: this one has to end.
    """
    with _checking:  # by the thread that writes logs, and by others
        _check(folder)


def _check(folder: Path) -> None:
    if is_ours(folder):
        return
    path = _path(folder)
    held = _ours.get(path)
    if held is None or _identity(folder) != held.folder or not (folder / "checkpoints").is_dir():
        raise LaunchError(
            f"the run folder {folder} is gone: somebody has removed or renamed it, or what was in it, while "
            "this job was at work. It ends, for nothing that it makes could be kept"
        )
    _take(folder, path, 0.0)
    os.close(held.handle)


def _take(folder: Path, path: Path, patience_s: float) -> None:
    handle = _opened(folder, path)
    # Alone, which proves that nobody has it; then shared. Who is quicker in between has it.
    alone = _locked(handle, fcntl.LOCK_EX, patience_s) and _locked(handle, fcntl.LOCK_SH, 0.0)
    if not alone or _identity(path) != _identity_of(os.fstat(handle)):
        os.close(handle)
        raise LaunchError(_whose(path, folder))
    _remember(folder, path, handle)


def _remember(folder: Path, path: Path, handle: int) -> None:
    there = _identity(folder)
    assert there is not None
    _ours[path] = Held(handle, _identity_of(os.fstat(handle)), there)


def _path(folder: Path) -> Path:
    return folder.resolve() / NAME


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        return _identity_of(os.stat(path, follow_symlinks=path.name != NAME))
    except OSError:
        return None


def _identity_of(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _opened(folder: Path, path: Path) -> int:
    try:
        return opened_to_lock(path)
    except OSError as error:
        raise LaunchError(
            f"cannot lock the run folder {folder} by its {NAME}: {error.strerror}. Remove that, or choose "
            "another folder with --run-dir"
        ) from error


def _locked(handle: int, kind: int, patience_s: float) -> bool:
    """Lock a file; False where another process has it, also after a while."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_EVERY_S)
        except OSError:
            return True  # a file system without locks


def _whose(path: Path, folder: Path) -> str:
    try:
        whose = read_json(path, STATUS_LIMIT_BYTES)
        pid, host, since = (shown(whose[key]).strip("'") for key in ("pid", "host", "since"))
        who = f"process {pid} on {host}, since {since}"
    except (OSError, ValueError, LookupError, TypeError):
        who = "another process"
    return (
        f"the run folder {folder} is in use by {who}. Wait for its end, end it, or choose another folder "
        "with --run-dir"
    )
