"""Other jobs that are bound to the cores of this one: mpirun begins with the first core for each of them."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from tf_dist import processes
from tf_dist.comm.starting import JOB, RANK


def shared_with(job: str, cores: Collection[int], proc: Path = processes.PROC) -> dict[int, list[int]]:
    """Ranks of other jobs that are bound to some of these cores, and to no others.

    Args:
        job: the launcher's name for this one.
        cores: to which a rank of this job is bound.
        proc: where to look; of this user's processes alone.

    Returns:
        Cores that are shared, by process.
    """
    found = dict[int, list[int]]()
    for pid in processes.all_pids(proc):
        try:
            words = (proc / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        names = [word.partition(b"=")[0].decode(errors="replace") for word in words]
        if JOB not in names or RANK not in names or f"{JOB}={job}".encode() in words:
            continue
        theirs = _cores_of(pid, proc)
        if theirs & set(cores) and len(theirs) < (os.cpu_count() or 1):
            found[pid] = sorted(theirs & set(cores))
    return found


def _cores_of(pid: int, proc: Path) -> set[int]:
    """``Cpus_allowed_list: 0-3,8`` as numbers."""
    try:
        lines = (proc / str(pid) / "status").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("Cpus_allowed_list")]
    listed = found[0] if found else ""
    cores = set[int]()
    for part in filter(None, listed.split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def warning(job: str, cores: Collection[int]) -> str:
    """What is to be said where another job is bound to cores of this one; empty where none is.

    Args:
        job: the launcher's name for this one.
        cores: to which this rank is bound.
    """
    if not job or len(cores) >= (os.cpu_count() or 1):
        return ""
    others = shared_with(job, cores)
    if not others:
        return ""
    pid, shared = next(iter(others.items()))
    return (
        f"warning: process {pid} of another job is bound to core {', '.join(map(str, shared))} as well, so "
        "each of the two has half of it. `mpirun --bind-to none` lets the system choose cores"
    )
