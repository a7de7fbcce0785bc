"""Control messages: the JSON values that ranks exchange beside arrays, each with the name of its purpose.

Ranks that are in different collectives take each other's values for their own: a list arrives where a number
was meant, and a `TypeError` far away is all that is said. So the purpose travels with the value, is compared
where it arrives, and a mismatch names what every rank is doing. All ranks see the same messages, and come to
the same verdict.

What is compared is the verb and the purpose: as the caller names it, or the calling function of this package.
Code of users may call from one function on one rank and from another one elsewhere: its verb alone counts.
``TF_DIST_DEBUG=1`` (`tf_dist.comm.debug`) is stricter, and looks at every collective.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tf_dist.comm.words import named
from tf_dist.errors import LaunchError

# Control messages are small by intent: facts, paths, manifests.
BYTES_LIMIT = 64 << 20
HERE = str(Path(__file__).parent)
PACKAGE = str(Path(__file__).parents[1]) + os.sep
ADVICE = (
    "All ranks must call the same collectives in the same order: is one inside `if comm.rank == 0`, or has a "
    "rank left one out? TF_DIST_DEBUG=1 finds the line"
)


class Purpose(NamedTuple):
    """What a control message is for. what: compared. site: where it was sent from, for people."""

    what: str
    site: str

    def __str__(self) -> str:
        return f"{self.what}, called at {self.site}"


def purpose(verb: str, what: str = "") -> Purpose:
    """The purpose of a control message that is about to be sent.

    Args:
        verb: of the Comm, with its root where it has one.
        what: the purpose, as the caller names it; empty: the calling function, where it is one of ours.
    """
    name, site, ours = _calling()
    if what or ours:
        return Purpose(f"{what or name} ({verb})", site)
    return Purpose(verb, f"{site} in {name}")


def encode(value: Any, to: Purpose) -> bytes:
    """A control message.

    Raises:
        ValueError: it is too large.
        TypeError: it is no JSON value.
    """
    raw = json.dumps([*to, value], separators=(",", ":")).encode()
    if len(raw) > BYTES_LIMIT:
        raise ValueError(f"{len(raw)} bytes are too many for an object; send an array")
    return raw


def decode(everyone: Sequence[bytes], mine: Purpose) -> list[Any]:
    """The values of all ranks.

    Args:
        everyone: the message of each rank, in rank order.
        mine: what this rank has sent its own for.

    Raises:
        LaunchError: on every rank, naming what each does: they are in different collectives.
        ValueError: what has arrived is no control message.
    """
    messages = [json.loads(raw) for raw in everyone]
    if not all(_is_message(one) for one in messages):
        raise ValueError(f"what has arrived in {mine} is no control message")
    purposes = [Purpose(what, site) for what, site, _ in messages]
    if len({one.what for one in purposes}) > 1:
        raise LaunchError(mismatch(purposes))
    return [value for _, _, value in messages]


def mismatch(purposes: Sequence[Purpose]) -> str:
    """What is said of ranks that are in different collectives."""
    ranks_of: dict[Purpose, list[int]] = {}
    for rank, one in enumerate(purposes):
        ranks_of.setdefault(one, []).append(rank)
    where = "; ".join(f"{named(ranks)} in {one}" for one, ranks in ranks_of.items())
    return f"the ranks are in different collectives: {where}. {ADVICE}"


def foreign(mine: Purpose) -> str:
    """What is said where the bytes of another collective have arrived."""
    return (
        f"the ranks are in different collectives: this one is in {mine}, and what has arrived there was sent "
        f"by a collective of another kind. {ADVICE}"
    )


def caller() -> tuple[str, str]:
    """Name and ``folder/file.py:line`` of the function outside ``comm/`` that called a collective."""
    return _calling()[:2]


def _calling() -> tuple[str, str, bool]:
    """The same, and whether it is a function of this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_below(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "?", "?", False
    # Not the whole path: installations on two nodes may lie in different folders.
    file = frame.f_code.co_filename
    site = "/".join(Path(file).parts[-2:])
    return frame.f_code.co_qualname, f"{site}:{frame.f_lineno}", file.startswith(PACKAGE)


def _is_below(file: str) -> bool:
    return file.startswith(HERE) or os.path.basename(file) == "contextlib.py"


def _is_message(one: Any) -> bool:
    return isinstance(one, list) and len(one) == 3 and all(isinstance(word, str) for word in one[:2])
