"""`tf-dist doctor`: leftovers of dead jobs in shared memory and temporary folders.

A process that is killed cannot remove what it has made: Open MPI's memory for messages (16 MB for each
rank), and folders of its launcher. Only files of this user are looked at, by names that we know. One is a
leftover if no process of this machine maps it, has it open, or is the one whose number its name bears. What
is younger than a minute may belong to a job that is being started. Processes of other containers that share a
folder with this one cannot be seen: nothing is removed unless that is asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from tf_dist import processes
from tf_dist.invocation import command

SHARED = Path("/dev/shm")  # noqa: S108 - looked into
# Files of the ranks of a job, which its name tells; and what bears the number of the process that made it.
OF_A_JOB = (
    re.compile(r"sm_segment\.(?P<job>.+)\.\d+"),
    re.compile(r"vader_segment\.(?P<job>.+)\.\d+"),
    re.compile(r"osc_sm\.(?P<job>.+)\.\d+\.\d+"),
)
OF_A_PROCESS = (
    re.compile(r"tf_dist-board-\d+-(?P<pid>\d+)-[0-9a-f]+"),
    re.compile(r"ompi\.(?P<pid>\d+)"),
    re.compile(r"prte\.(?P<host>.+)\.(?P<pid>\d+)\.\d+"),
)
# A job that is just being started has made files that it does not use yet.
YOUNG_S = 60.0


class Leftover(NamedTuple):
    """A file or folder that nobody uses. made_by: what it is. size: in bytes, with all that is in it."""

    path: Path
    made_by: str
    size: int


class OpaqueProcess(NamedTuple):
    """A process that may use anything: it may not be looked into."""

    pid: int
    name: str


def folders() -> list[Path]:
    """Where jobs leave things on this machine."""
    return sorted({path for path in (SHARED, Path(tempfile.gettempdir()), Path("/tmp")) if path.is_dir()})  # noqa: S108


def leftovers(where: Sequence[Path]) -> tuple[list[Leftover], list[OpaqueProcess]]:
    """What dead jobs of this user have left; and processes that keep us from being sure of anything.

    Args:
        where: folders.
    """
    candidates = [path for folder in where for path in sorted(folder.iterdir()) if _is_ours_and_old(path)]
    used, doubts = _in_use([str(path) for path in candidates])
    living = {_job(path) for path in candidates if str(path) in used} - {""}
    found = []
    for path in candidates:
        if str(path) in used or _job(path) in living or _maker_lives(path) or _is_of_elsewhere(path):
            continue
        found.append(Leftover(path, _made_by(path), _size(path)))
    return found, doubts


def remove(found: Iterable[Leftover]) -> list[str]:
    """Remove them; what could not be, and why."""
    failed = []
    for one in found:
        try:
            if one.path.is_dir():
                shutil.rmtree(one.path)
            else:
                one.path.unlink()
        except OSError as error:
            failed.append(f"{one.path}: {error.strerror}")
    return failed


def report(where: Sequence[Path], clean: bool) -> tuple[list[str], bool]:
    """What there is, as lines; and whether all is well, now that it has been removed if that was wanted."""
    if not (processes.PROC / "self").exists():
        return ["doctor needs /proc to see which processes are alive: it looks at nothing"], True
    found, doubts = leftovers(where)
    names = ", ".join(map(str, where))
    if doubts:
        said = ", ".join(f"{doubt.name} (pid {doubt.pid})" for doubt in doubts)
        return [f"not sure of anything in {names}: these may not be looked into: {said}"], False
    if not found:
        return [f"nothing of dead jobs in {names}"], True
    lines = [f"{one.size / 1e6:8.1f} MB  {one.path}  ({one.made_by})" for one in found]
    size = sum(one.size for one in found)
    total = f"{len(found)} leftover{'s' * (len(found) > 1)} of dead jobs, {size / 1e6:.1f} MB"
    if not clean:
        return [*lines, f"{total}. `{command('doctor')} --clean` removes them"], True
    failed = remove(found)
    return [*lines, *failed, f"{total}: removed{f', but for {len(failed)}' if failed else ''}"], not failed


def _is_ours_and_old(path: Path) -> bool:
    if not _made_by(path):
        return False
    try:
        facts = path.lstat()
    except OSError:
        return False
    return facts.st_uid == os.getuid() and not path.is_symlink() and time.time() - facts.st_mtime >= YOUNG_S


def _made_by(path: Path) -> str:
    name = path.name
    if any(pattern.fullmatch(name) for pattern in OF_A_JOB) or name.startswith(("ompi.", "prte.")):
        known = any(pattern.fullmatch(name) for pattern in (*OF_A_JOB, *OF_A_PROCESS))
        return "Open MPI" if known else ""
    return "tf_dist" if OF_A_PROCESS[0].fullmatch(name) else ""


def _job(path: Path) -> str:
    found = next((match for pattern in OF_A_JOB if (match := pattern.fullmatch(path.name))), None)
    # `sm_segment` has host, user and job, `osc_sm` host, job and communicator: the number is in both.
    number = re.search(r"\.([0-9a-f]{5,})\b", found["job"] + ".") if found else None
    return number[1] if number else ""


def _maker_lives(path: Path) -> bool:
    found = next((match for pattern in OF_A_PROCESS if (match := pattern.fullmatch(path.name))), None)
    return found is not None and psutil.pid_exists(int(found["pid"]))


def _is_of_elsewhere(path: Path) -> bool:
    """Whether a folder that hosts share is of another one, whose processes are not seen from here."""
    if not path.is_dir():
        return False
    hosts = [entry.name.split(".")[1] for entry in path.glob("pmix.*.*")]
    return any(host not in (socket.gethostname(), socket.gethostname().split(".")[0]) for host in hosts)


def _in_use(paths: Sequence[str]) -> tuple[set[str], list[OpaqueProcess]]:
    """Those which some process maps, has open, or is in; and processes that do not show what they do."""
    used, doubts = set[str](), list[OpaqueProcess]()
    for pid in psutil.pids():
        try:
            text = _shown(processes.PROC / str(pid))
        except PermissionError:
            doubts += _doubt(pid)
            continue
        except OSError:  # it has just ended
            continue
        used |= {path for path in paths if path in text}
    return used, doubts


def _shown(process: Path) -> str:
    """Every path that a process uses."""
    lines = [(process / "maps").read_text(errors="replace"), os.readlink(process / "cwd")]
    for handle in (process / "fd").iterdir():
        try:
            lines.append(os.readlink(handle))
        except FileNotFoundError:
            continue
    return "\n".join(lines)


def _doubt(pid: int) -> list[OpaqueProcess]:
    """Of this user's processes, those that may belong to a job: others (an ssh-agent) hide as well."""
    found = processes.find(pid)
    try:
        mine = (processes.PROC / str(pid)).stat().st_uid == os.getuid()
    except OSError:
        return []
    may_be = found is not None and (found.name in processes.LAUNCHERS or found.name.startswith("python"))
    return [OpaqueProcess(pid, found.name)] if found is not None and mine and may_be else []


def _size(path: Path) -> int:
    try:
        if not path.is_dir():
            return path.stat().st_size
        return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:
        return 0
