"""``status.json`` of killed jobs, which could not write it: corrected by the next reader."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from tf_dist.atomic_io import write_whole
from tf_dist.errors import TfDistError
from tf_dist.run.run_lock import is_free
from tf_dist.untrusted_files import STATUS_LIMIT_BYTES, read_json

# States of a live job.
ALIVE = ("running", "stopping")
KILLED = 137


def correct(folder: Path, ours: bool = False) -> None:
    """Mark the job of a run folder as failed if it is marked as live and none is.

    If that cannot be known (no locks on this file system, no permission) nothing is changed.

    Args:
        folder: of a run, or any other.
        ours: this process holds its lock.
    """
    path = folder / "status.json"
    with contextlib.suppress(OSError, TfDistError, ValueError, KeyError, TypeError, AttributeError):
        status: dict[str, Any] = read_json(path, STATUS_LIMIT_BYTES)
        if status["state"] not in ALIVE or not (ours or is_free(folder)):
            return
        message = "the job was killed from outside, before it could record why"
        status["failures"].append({"rank": None, "message": message, "unix_time": time.time()})
        status.update(state="failed", exit_code=status.get("exit_code") or KILLED)
        write_whole(path, (json.dumps(status, indent=1) + "\n").encode())
