"""Lock of a run folder: two jobs at a time would mix up checkpoints and metrics.

The lock is the job's, not one rank's: the first rank takes it exclusively, then all ranks share it, so that
it outlives the first rank. The kernel releases it with the last process of the job, however that ends: there
are no stale locks. The contents of the file, who has it, are for the user.
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
# A job that was just killed may still hold it.
GOING_S = 3.0
LOOK_EVERY_S = 0.05


class LockHolder(NamedTuple):
    """A lock of this process. handle: kept open, as closing it unlocks. file, folder: device and inode."""

    handle: int
    file: tuple[int, int]
    folder: tuple[int, int]


# By the path of the file: flock would lock this process out.
_ours: dict[Path, LockHolder] = {}
_checking = threading.Lock()


def claim(folder: Path) -> None:
    """Lock a run folder for this job, on its first rank, until its last process ends.

    Raises:
        LaunchError: another job has it, named with host and start time; or it cannot be locked.
    """
    path = _path(folder)
    if not is_ours(folder):
        before = _ours.pop(path, None)
        if before is not None:  # of a removed folder of that name
            os.close(before.handle)
        _take(folder, path, GOING_S)
    mine = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk: the lock is what counts
        os.ftruncate(_ours[path].handle, 0)
        os.pwrite(_ours[path].handle, (json.dumps(mine) + "\n").encode(), 0)


def share(folder: Path) -> None:
    """Share the lock that the first rank of this job has claimed; on every other rank.

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
    """Whether this process still holds the lock, claimed or shared."""
    held = _ours.get(_path(folder))
    return held is not None and (held.folder, held.file) == (_identity(folder), _identity(_path(folder)))


def is_free(folder: Path) -> bool:
    """Whether certainly no process holds the lock of a run folder, also of a read-only one."""
    path = _path(folder)
    if not os.path.lexists(path):
        return True
    try:
        handle = opened_to_lock(path)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def check(folder: Path) -> None:
    """Check before a write that the folder is there and still ours; on the first rank.

    A removed lock file is created again, unless another job was faster.

    Raises:
        LaunchError: the folder is gone, or another job has it: this one must end.
    """
    with _checking:  # called by the thread that writes logs as well
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
    # Exclusively, which proves that no process has it; then shared. A faster job may take it in between.
    alone = _locked(handle, fcntl.LOCK_EX, patience_s) and _locked(handle, fcntl.LOCK_SH, 0.0)
    if not alone or _identity(path) != _identity_of(os.fstat(handle)):
        os.close(handle)
        raise LaunchError(_whose(path, folder))
    _remember(folder, path, handle)


def _remember(folder: Path, path: Path, handle: int) -> None:
    there = _identity(folder)
    assert there is not None
    _ours[path] = LockHolder(handle, _identity_of(os.fstat(handle)), there)


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
    """Lock a file; False if another process has it until the time is over."""
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
