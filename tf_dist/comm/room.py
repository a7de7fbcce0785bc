"""How much memory a process may still have, by each of the limits that hold for it.

Read from /proc and, of cgroups, version 2; where these are missing, nothing is known and nothing refused.
"""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tf_dist.comm.base import Comm
from tf_dist.errors import OutOfMemory, ways_out

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class Limit(NamedTuple):
    """A limit on memory, and what is left of it.

    what: its name, for people. scope: processes with the same one share it; empty: it is of this process
    alone. total, free: bytes.
    """

    what: str
    scope: str
    total: int
    free: int


def limits() -> list[Limit]:
    """Every limit that is known to hold for this process."""
    return [*_of_process(), *_of_cgroups(), *_of_node()]


def has_room(wanted: int, ranks: int) -> bool:
    """Whether every limit leaves so many bytes, as far as is known, and as many to each of the other ranks.

    Args:
        wanted: bytes.
        ranks: of the job, all of which may share the memory of a node.
    """
    return all(limit.free >= wanted * (ranks if limit.scope else 1) for limit in limits())


def refuse_too_much(comm: Comm, wanted: int, what: str) -> None:
    """Refuse what ranks cannot have, before one of them dies of it without a word; a collective.

    Args:
        comm: all ranks.
        wanted: bytes that this rank will certainly ask for.
        what: they are for.

    Raises:
        OutOfMemory: on every rank, with the arithmetic.
    """
    # Only a refusal says why: C++ that is refused memory may end the process, and the kernel kills it.
    everyone = comm.allgather_obj([wanted, [list(limit) for limit in limits()]])
    refusal = _refusal(everyone)
    if refusal:
        raise OutOfMemory(f"{refusal} ({what}). {ways_out()}")


def _refusal(everyone: list[Any]) -> str:
    """What is wanted of the first limit that it exceeds; empty where there is none."""
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
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"


def _of_process() -> Iterator[Limit]:
    used = _fields(PROC / "self" / "status")
    for name, field, what in (
        (resource.RLIMIT_AS, "VmSize", "the address space of a process (ulimit -v)"),
        (resource.RLIMIT_DATA, "VmData", "the data of a process (ulimit -d)"),
    ):
        total = resource.getrlimit(name)[0]
        if total != resource.RLIM_INFINITY and field in used:
            yield Limit(what, "", total, total - used[field])


def _of_node() -> Iterator[Limit]:
    known = _fields(PROC / "meminfo")
    if "MemAvailable" in known:
        free = known["MemAvailable"] + known.get("SwapFree", 0)
        yield Limit("the node's memory", socket.gethostname(), known["MemTotal"], free)


def _of_cgroups() -> Iterator[Limit]:
    """Of this process's group and those around it. What is in use: what the kernel cannot write back."""
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


def _fields(path: Path) -> dict[str, int]:
    """Lines such as "VmSize:   1024 kB" as bytes by name."""
    found = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
