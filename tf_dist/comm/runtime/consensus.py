"""Consensus: before the first step, all ranks must describe the same run.

Ranks with another configuration, another version of Keras or other data would train different models, or
wait for each other forever. They end with a message that lists the differences instead.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from tf_dist import errors
from tf_dist.comm.formatting import named
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import LaunchError, TfDistError
from tf_dist.version import __version__

ONE_START = "Start all ranks with one command line, environment and installation"
# The first differences of a long list tell most: the others follow from them.
SHOWN = 12
T = TypeVar("T")
PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "numpy", "mpi4py", "tokenizers")


def agree(
    comm: Comm, facts: Mapping[str, Any], about: str, advice: str = ONE_START, shown: int = SHOWN
) -> None:
    """Compare facts between all ranks; a collective.

    Args:
        comm: all ranks.
        facts: JSON values by name.
        about: what they describe, for the message.
        advice: how to fix a difference.
        shown: number of differences that are listed; the rest are counted.

    Raises:
        LaunchError: on every rank, with the same message, if any fact differs on any rank.
    """
    everyone = comm.allgather_obj(dict(facts), what=f"the comparison of {about}")
    names = dict.fromkeys(name for facts_there in everyone for name in facts_there)
    lines = [difference(name, [there.get(name) for there in everyone]) for name in names]
    differences = [line for line in lines if line]
    if differences:
        more = len(differences) - shown
        differences[shown:] = [f"and {more} more"] if more > 0 else []
        raise LaunchError(
            f"the ranks do not agree on {about}:\n  " + "\n  ".join(differences) + f"\n{advice}"
        )


def agree_on_many(comm: Comm, facts: Mapping[str, Any], about: str, advice: str = ONE_START) -> None:
    """`agree` for many facts: only their hash is exchanged, unless it differs."""
    raw = json.dumps(facts, sort_keys=True).encode()
    digests = comm.allgather_obj(hashlib.sha256(raw).hexdigest(), what=f"the comparison of {about}")
    if len(set(digests)) > 1:
        agree(comm, facts, about, advice)


def on_root(comm: Comm, function: Callable[[], Any]) -> Any:
    """Call ``function`` on rank 0 only and return its JSON result on all ranks; a collective.

    Raises:
        TfDistError: on every rank, if ``function`` raised one on rank 0: so it is reported once.
    """
    outcome: dict[str, Any] = {}
    if comm.rank == 0:
        try:
            outcome = {"value": function()}
        except TfDistError as error:
            outcome = {"error": str(error), "kind": type(error).__name__}
    outcome = comm.broadcast_obj(outcome)
    if "error" in outcome:
        raise getattr(errors, outcome["kind"])(outcome["error"])
    return outcome["value"]


def everywhere(comm: Comm, function: Callable[[], T]) -> T:
    """Call ``function`` on every rank and return its local result; a collective.

    Raises:
        TfDistError: on every rank, if ``function`` raised one on any; names the ranks unless all of them
            failed.
    """
    value, problem = None, None
    try:
        value = function()
    except TfDistError as error:
        problem = [type(error).__name__, str(error)]
    problems = comm.allgather_obj(problem)
    failed = [rank for rank, found in enumerate(problems) if found]
    if not failed:
        return cast(T, value)
    kind, text = problems[failed[0]]
    alike = [rank for rank in failed if problems[rank] == [kind, text]]
    raise getattr(errors, kind)(text if len(alike) == comm.size else f"{named(alike)}: {text}")


def versions() -> dict[str, str]:
    """Versions that change what a rank computes, without importing the packages."""
    found = {"python": platform.python_version(), "tf_dist": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def difference(name: str, values: list[Any]) -> str:
    """``keras: 3.14 on ranks 0 1, 3.15 on rank 2``; empty if all are equal."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault("nothing" if value is None else str(value), []).append(rank)
    if len(ranks) == 1:
        return ""
    parts = [
        f"{value} on rank{'s' * (len(who) > 1)} {' '.join(map(str, who))}" for value, who in ranks.items()
    ]
    return f"{name}: " + ", ".join(parts)
