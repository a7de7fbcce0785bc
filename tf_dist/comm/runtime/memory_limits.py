"""Memory limits: how much memory a process may still allocate under each limit that applies to it.

By psutil and, of cgroups, version 2; where these know nothing, nothing is refused.
"""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import OutOfMemory, ways_out

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class Limit(NamedTuple):
    """A limit on memory, and what remains of it.

    what: its name, for messages. scope: processes with the same scope share the limit; empty: it applies to
    this process only. total, free: bytes.
    """

    what: str
    scope: str
    total: int
    free: int


def limits() -> list[Limit]:
    """All known limits of this process."""
    return [*_of_process(), *_of_cgroups(), *_of_node()]


def has_room(wanted: int, ranks: int) -> bool:
    """Whether every known limit leaves this many bytes to this rank, and as many to each of the others.

    Args:
        wanted: bytes.
        ranks: of the job, all of which may share the memory of a node.
    """
    return all(limit.free >= wanted * (ranks if limit.scope else 1) for limit in limits())


def refuse_too_much(comm: Comm, wanted: int, what: str) -> None:
    """Refuse an allocation that ranks cannot make, before the kernel kills one silently; a collective.

    Args:
        comm: all ranks.
        wanted: bytes that this rank will certainly allocate.
        what: purpose of the memory, for the message.

    Raises:
        OutOfMemory: on every rank, with the arithmetic.
    """
    # Only this check explains: a failed C++ allocation may end the process, and the OOM killer is silent.
    everyone = comm.allgather_obj([wanted, [list(limit) for limit in limits()]])
    refusal = _refusal(everyone)
    if refusal:
        raise OutOfMemory(f"{refusal} ({what}). {ways_out()}")


def _refusal(everyone: list[Any]) -> str:
    """Message about the first limit that is exceeded; empty if there is none."""
    shared: dict[tuple[str, str], list[tuple[int, Limit]]] = {}
    for rank, (wanted, found) in enumerate(everyone):
        for limit in (Limit(*one) for one in found):
            scope = limit.scope or f"rank {rank}"
            shared.setdefault((limit.what, scope), []).append((wanted, limit))
    for (what, scope), users in shared.items():
        wanted, free = sum(one for one, _ in users), min(limit.free for _, limit in users)
        if wanted > free:
            who = scope if len(users) == 1 and scope.startswith("rank ") else f"{len(users)} ranks together"
            return (
                f"out of memory before the first step: {who} will need at least {gib(wanted)} more, and of "
                f"{what}, {gib(users[0][1].total)}, {gib(max(0, free))} are left"
            )
    return ""


def gib(count: float) -> str:
    """Format bytes in GiB."""
    return f"{count / 2**30:.2f} GiB"


def _of_process() -> Iterator[Limit]:
    try:
        used = psutil.Process().memory_info()
    except (psutil.Error, OSError):
        return
    for name, size, what in (
        (resource.RLIMIT_AS, used.vms, "the address space of a process (ulimit -v)"),
        (resource.RLIMIT_DATA, used.data, "the data of a process (ulimit -d)"),
    ):
        total = resource.getrlimit(name)[0]
        if total != resource.RLIM_INFINITY:
            yield Limit(what, "", total, total - size)


def _of_node() -> Iterator[Limit]:
    with contextlib.suppress(psutil.Error, OSError):
        memory = psutil.virtual_memory()
        free = memory.available + psutil.swap_memory().free
        yield Limit("the node's memory", socket.gethostname(), memory.total, free)


def _of_cgroups() -> Iterator[Limit]:
    """Of this process's cgroup and its ancestors. In use: what the kernel cannot write back."""
    lines = _text(PROC / "self" / "cgroup").splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::/")), None)
    if path is None:
        return
    group = Path(path)
    for one in (group, *group.parents):
        folder = CGROUPS / one.relative_to("/")
        total, used = _text(folder / "memory.max").strip(), 0
        if not total.isdigit():
            continue
        for line in _text(folder / "memory.stat").splitlines():
            name, _, count = line.partition(" ")
            used += int(count) if name in ("anon", "shmem") else 0
        scope = f"{socket.gethostname()}:{one}"
        yield Limit(f"the memory of cgroup {one}", scope, int(total), int(total) - used)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
