"""Detect other jobs bound to the cores of this one: every mpirun starts at the first core."""

from __future__ import annotations

import os
from collections.abc import Collection

import psutil

from tf_dist.comm.runtime.startup import JOB, RANK


def shared_with(job: str, cores: Collection[int]) -> dict[int, list[int]]:
    """Ranks of other jobs that are bound to some of these cores, and to no others; of this user's alone.

    Args:
        job: the launcher's name for this one.
        cores: to which a rank of this job is bound.

    Returns:
        Shared cores, by process id.
    """
    found = dict[int, list[int]]()
    for process in psutil.process_iter():
        try:
            words, theirs = process.environ(), set(process.cpu_affinity() or ())
        except psutil.Error:  # another user's, or gone
            continue
        if RANK not in words or words.get(JOB, job) == job:
            continue
        if theirs & set(cores) and len(theirs) < (os.cpu_count() or 1):
            found[process.pid] = sorted(theirs & set(cores))
    return found


def warning(job: str, cores: Collection[int]) -> str:
    """Warning if another job is bound to cores of this one; empty otherwise.

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
