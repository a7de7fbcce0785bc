"""Other processes of this machine, as Linux's /proc shows them; where there is none, nothing is known."""

from __future__ import annotations

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


def find(pid: int, proc: Path = PROC) -> Process | None:
    """A process by its number; None where there is no such one, or no /proc."""
    try:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    front, _, rest = text.rpartition(")")  # a name may hold anything, also brackets
    fields = rest.split()
    return Process(pid, front.partition("(")[2], fields[0], int(fields[1]), int(fields[19]))


def state_of(pid: int, started: int, proc: Path = PROC) -> str:
    """The state of the process that had this number at that time.

    Returns:
        One letter: R, S, D: alive; T, t: stopped; Z: it has ended, and its parent has not noticed. Empty: it
        is gone. ``?``: there is no /proc to look into.
    """
    if not proc.joinpath("self").exists():
        return UNKNOWN
    found = find(pid, proc)
    if found is None or (started and found.started != started):
        return ""
    return "Z" if found.state in "ZX" else found.state


def has_terminal(pid: int, proc: Path = PROC) -> bool:
    """Whether a process was started from a terminal, and can be reached by the keys typed there."""
    try:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return False
    return int(text.rpartition(")")[2].split()[4]) != 0


def ancestors(pid: int, proc: Path = PROC) -> Iterator[Process]:
    """The parent of a process, its parent, and so on."""
    process = find(pid, proc)
    while process is not None and process.parent > 0:
        process = find(process.parent, proc)
        if process is not None:
            yield process


def launcher_above(pid: int, proc: Path = PROC) -> Process | None:
    """The process of a launcher that has started this one, by whatever scripts in between; None: none has."""
    return next((process for process in ancestors(pid, proc) if process.name in LAUNCHERS), None)


def all_pids(proc: Path = PROC) -> list[int]:
    """All processes, of all users."""
    return [int(entry.name) for entry in proc.iterdir() if entry.name.isdigit()]
