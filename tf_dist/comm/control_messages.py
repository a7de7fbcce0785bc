"""Control messages: JSON values that ranks exchange besides arrays, each tagged with its purpose.

Ranks in different collectives would take each other's values for their own: a list arrives where a number
is expected, and the only symptom is a `TypeError` far away. So the purpose travels with the value and is
compared on arrival; a mismatch reports what every rank is doing. All ranks see the same messages, and reach
the same verdict.

The verb and the purpose are compared; the purpose is given by the caller, or is the calling function of this
package. User code may call from different functions on different ranks: there only the verb counts.
``TF_DIST_DEBUG=1`` (`tf_dist.comm.runtime.collective_order`) is stricter, and compares every collective.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tf_dist.comm.formatting import named
from tf_dist.errors import LaunchError

# Control messages are small by design: facts, paths, manifests.
BYTES_LIMIT = 64 << 20
HERE = str(Path(__file__).parent)
PACKAGE = str(Path(__file__).parents[1]) + os.sep
ADVICE = (
    "All ranks must call the same collectives in the same order: is one inside `if comm.rank == 0`, or has a "
    "rank left one out? TF_DIST_DEBUG=1 finds the line"
)


class Purpose(NamedTuple):
    """What a control message is for. what: compared. site: where it was sent from, for error messages."""

    what: str
    site: str

    def __str__(self) -> str:
        return f"{self.what}, called at {self.site}"


def purpose(verb: str, what: str = "") -> Purpose:
    """Build the purpose of the control message that is about to be sent.

    Args:
        verb: of the Comm, with its root if it has one.
        what: the purpose, as the caller names it; empty: the name of the calling function, if it is in this
            package.
    """
    name, site, ours = _calling()
    if what or ours:
        return Purpose(f"{what or name} ({verb})", site)
    return Purpose(verb, f"{site} in {name}")


def encode(value: Any, to: Purpose) -> bytes:
    """Encode a control message.

    Raises:
        ValueError: it is too large.
        TypeError: the value is not JSON.
    """
    raw = json.dumps([*to, value], separators=(",", ":")).encode()
    if len(raw) > BYTES_LIMIT:
        raise ValueError(f"{len(raw)} bytes are too many for an object; send an array")
    return raw


def decode(everyone: Sequence[bytes], mine: Purpose) -> list[Any]:
    """Decode the values of all ranks.

    Args:
        everyone: the message of each rank, in rank order.
        mine: the purpose of this rank's own message.

    Raises:
        LaunchError: on every rank, naming what each does: the ranks are in different collectives.
        ValueError: the bytes are not a control message.
    """
    messages = [json.loads(raw) for raw in everyone]
    if not all(_is_message(one) for one in messages):
        raise ValueError(f"what has arrived in {mine} is no control message")
    purposes = [Purpose(what, site) for what, site, _ in messages]
    if len({one.what for one in purposes}) > 1:
        raise LaunchError(mismatch(purposes))
    return [value for _, _, value in messages]


def mismatch(purposes: Sequence[Purpose]) -> str:
    """Error message for ranks that are in different collectives."""
    ranks_of: dict[Purpose, list[int]] = {}
    for rank, one in enumerate(purposes):
        ranks_of.setdefault(one, []).append(rank)
    where = "; ".join(f"{named(ranks)} in {one}" for one, ranks in ranks_of.items())
    return f"the ranks are in different collectives: {where}. {ADVICE}"


def foreign(mine: Purpose) -> str:
    """Error message for bytes that belong to another collective."""
    return (
        f"the ranks are in different collectives: this one is in {mine}, and what has arrived there was sent "
        f"by a collective of another kind. {ADVICE}"
    )


def caller() -> tuple[str, str]:
    """Name and ``folder/file.py:line`` of the function outside ``comm/`` that called a collective."""
    return _calling()[:2]


def _calling() -> tuple[str, str, bool]:
    """Name and site of the calling function, and whether it belongs to this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_below(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "?", "?", False
    # Not the full path: two nodes may have the package in different folders.
    file = frame.f_code.co_filename
    site = "/".join(Path(file).parts[-2:])
    return frame.f_code.co_qualname, f"{site}:{frame.f_lineno}", file.startswith(PACKAGE)


def _is_below(file: str) -> bool:
    return file.startswith(HERE) or os.path.basename(file) == "contextlib.py"


def _is_message(one: Any) -> bool:
    return isinstance(one, list) and len(one) == 3 and all(isinstance(word, str) for word in one[:2])
