"""Other processes of this machine, as Linux's /proc shows them; where there is none, nothing is known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
UNKNOWN = "?"
# What starts ranks, by the names of its processes: Open MPI 5 and 4, MPICH and Intel MPI, Slurm, Cray.
LAUNCHERS = frozenset(
    "prterun prted prte mpirun mpiexec orterun orted hydra_pmi_proxy hydra_bstrap_pr mpiexec.hydra "
    "slurmstepd palsd".split()
)
# Of these, the ones that a person starts, whose stderr is that of the job.
MPIRUNS = frozenset("prterun prte mpirun mpiexec orterun mpiexec.hydra".split())


class Process(NamedTuple):
    """A process. state: a letter, as in ps. started: when, in ticks: a later one may have its number."""

    pid: int
    name: str
    state: str
    parent: int
    started: int


def find(pid: int) -> Process | None:
    """A process by its number; None where there is no such one, or no /proc."""
    # Not by psutil: a watchdog asks this four times a second, and its time of creation moves with the clock.
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    front, _, rest = text.rpartition(")")  # a name may hold anything, also brackets
    fields = rest.split()
    return Process(pid, front.partition("(")[2], fields[0], int(fields[1]), int(fields[19]))


def state_of(pid: int, started: int) -> str:
    """The state of the process that had this number at that time.

    Returns:
        One letter: R, S, D: alive; T, t: stopped; Z: it has ended, and its parent has not noticed. Empty: it
        is gone. ``?``: there is no /proc to look into.
    """
    if not PROC.joinpath("self").exists():
        return UNKNOWN
    found = find(pid)
    if found is None or (started and found.started != started):
        return ""
    return "Z" if found.state in "ZX" else found.state


def has_terminal() -> bool:
    """Whether this process was started from a terminal, and can be reached by the keys typed there."""
    try:
        os.close(os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def ancestors(pid: int) -> Iterator[Process]:
    """The parent of a process, its parent, and so on."""
    process = find(pid)
    while process is not None and process.parent > 0:
        process = find(process.parent)
        if process is not None:
            yield process


def launcher_above(pid: int) -> Process | None:
    """The process of a launcher that has started this one, by whatever scripts in between; None: none has."""
    return next((process for process in ancestors(pid) if process.name in LAUNCHERS), None)
