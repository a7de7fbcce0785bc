"""Compare the order of collectives between ranks, before each one: enabled by ``TF_DIST_DEBUG=1``.

Mismatched collectives (another operation, type or length, one missing, two swapped) return wrong numbers or
hang. So before each collective every rank sends a fingerprint of it to every other rank, in a message of
fixed size, and none starts until all fingerprints have arrived and are equal. All ranks see the same
fingerprints and reach the same verdict.

A fingerprint holds the number of the collective, its verb, dtype, count and root, and the name and line of
the calling function. The line matters: two swapped calls of the same form differ in nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tf_dist.comm.control_messages import caller
from tf_dist.comm.formatting import named
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import OrderError, UsageError

SWITCH = "TF_DIST_DEBUG"
LIMIT = "TF_DIST_DEBUG_LIMIT_S"
DEFAULT_LIMIT_S = 60.0
RECORD_BYTES = 512
# How long other ranks wait for the lowest waiting rank, which ends the job.
FLOOR_S = 3.0
# Polling interval: polling without sleep would slow ranks that share a core.
LOOK_EVERY_S = 0.0002


class Fingerprint(NamedTuple):
    """One collective, as one rank is about to call it."""

    number: int
    verb: str
    dtype: str
    length: int
    root: int
    name: str
    site: str

    def __str__(self) -> str:
        what = f" of {self.length:,} {self.dtype}" if self.dtype else ""
        where = f" with root {self.root}" if self.verb in ("broadcast", "gather") else ""
        return f"{self.verb}{what}{where}, called by {self.name} at {self.site}"


def keep_order(comm: Comm, environment: Mapping[str, str], mpi: Callable[[], Any]) -> Comm:
    """Compare every collective of ``comm`` from now on, if any rank's environment asks for it; a collective.

    Args:
        comm: all ranks.
        environment: ``TF_DIST_DEBUG`` (not empty, not 0) and ``TF_DIST_DEBUG_LIMIT_S``, seconds.
        mpi: creates an MPI communicator of the same ranks, used by nothing else.

    Returns:
        ``comm``.

    Raises:
        UsageError: on every rank, if a limit is not a number of seconds.
    """
    if comm.size == 1:
        return comm
    # All-gathered first: launchers do not pass every variable to every node.
    switches = comm.allgather_obj([environment.get(SWITCH, "") not in ("", "0"), environment.get(LIMIT, "")])
    if any(wanted for wanted, _ in switches):
        limits = [_seconds(text) for _, text in switches if text]
        comm.before = CollectiveOrder(mpi(), max(limits, default=DEFAULT_LIMIT_S)).meet
    return comm


class CollectiveOrder:
    """The order in which the ranks of an MPI communicator call collectives.

    Args:
        mpi: for fingerprints only.
        limit_s: seconds that ranks wait for each other.
    """

    def __init__(self, mpi: Any, limit_s: float) -> None:
        self._mpi, self.limit_s = mpi, limit_s
        self.rank, self.size = mpi.Get_rank(), mpi.Get_size()
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self._last: list[Fingerprint | None] = [None] * self.size
        self._number = 0

    def meet(self, verb: str, array: np.ndarray | None, root: int) -> None:
        """Wait until all ranks are about to start the same collective.

        Raises:
            OrderError: the collectives differ (on every rank), or ranks did not arrive in time (on the ranks
                that wait).
        """
        self._number += 1
        name, site = caller()
        dtype, length = ("", 0) if array is None else (str(array.dtype), array.size)
        mine = Fingerprint(self._number, verb, dtype, length, root, name, site)
        everyone = self._exchange(mine)
        if len(set(everyone)) > 1:
            raise OrderError(_disorder(everyone, self._last))
        self._last = list(everyone)

    def _exchange(self, mine: Fingerprint) -> list[Fingerprint]:
        records = self._records = np.zeros((self.size, RECORD_BYTES), np.uint8)  # kept alive for MPI
        records[self.rank] = _packed(mine)
        # Messages between two ranks arrive in the order in which they were sent: collectives need no tags.
        receives = {rank: self._mpi.Irecv(records[rank], source=rank) for rank in self._others}
        sends = [self._mpi.Isend(records[self.rank], dest=rank) for rank in self._others]
        arrived = {self.rank: time.monotonic()}
        while len(arrived) < self.size:
            for rank in [rank for rank, request in receives.items() if request.Test()]:
                del receives[rank]
                arrived[rank] = time.monotonic()
            self._check_limit(arrived, records)
        for request in sends:
            request.Wait()  # every receive has been posted
        return [_unpacked(record) for record in records]

    def _check_limit(self, arrived: Mapping[int, float], records: np.ndarray) -> None:
        """End the wait for ranks that do not arrive; the lowest waiting rank reports.

        Raises:
            OrderError: the limit has passed.
        """
        speaker = min(arrived)
        patience = self.limit_s + (0.0 if speaker == self.rank else FLOOR_S)
        if time.monotonic() - arrived[speaker] > patience:
            here = {rank: _unpacked(records[rank]) for rank in sorted(arrived)}
            raise OrderError(_missing(here, self._last, self.limit_s))
        time.sleep(LOOK_EVERY_S)


def _packed(fingerprint: Fingerprint) -> np.ndarray:
    """Its JSON, truncated to the record size: the end of a long name or path is the least useful part."""
    shorter = fingerprint._replace(name=fingerprint.name[-100:], site=fingerprint.site[-140:])
    raw = json.dumps(shorter).encode("ascii")
    if len(raw) > RECORD_BYTES:
        raw = json.dumps(shorter._replace(name="?", site=f"line {shorter.site.rpartition(':')[2]}")).encode()
    return np.frombuffer(raw.ljust(RECORD_BYTES), np.uint8)


def _unpacked(record: np.ndarray) -> Fingerprint:
    return Fingerprint(*json.loads(record.tobytes()))


def _disorder(everyone: list[Fingerprint], last: list[Fingerprint | None]) -> str:
    groups: dict[Fingerprint, list[int]] = {}
    for rank, fingerprint in enumerate(everyone):
        groups.setdefault(fingerprint, []).append(rank)
    most = max(groups.values(), key=len)
    outvoted = [rank for rank in range(len(everyone)) if rank not in most]
    who = named(outvoted) if 2 * len(most) > len(everyone) else named(list(range(len(everyone))))
    lines = [f"{who} left the common order of collectives at number {everyone[0].number}:"]
    lines += [f"{named(ranks)}: {fingerprint}" for fingerprint, ranks in groups.items()]
    lines.append(f"the last one in common: {last[0] or 'none'}")
    if len({fingerprint[:5] for fingerprint in groups}) == 1:
        lines.append("they differ in the line alone: let all ranks call a collective from one line")
    return "\n  ".join(lines)


def _missing(here: Mapping[int, Fingerprint], last: list[Fingerprint | None], limit_s: float) -> str:
    away = [rank for rank in range(len(last)) if rank not in here]
    number = here[min(here)].number
    lines = [f"{named(away)} did not come to collective number {number} within {limit_s:g} s:"]
    groups: dict[Fingerprint, list[int]] = {}
    for rank, fingerprint in here.items():
        groups.setdefault(fingerprint, []).append(rank)
    lines += [f"{named(ranks)}: waiting in {fingerprint}" for fingerprint, ranks in groups.items()]
    lines.append(f"{named(away)}: last seen in {last[away[0]] or 'no collective'}")
    lines.append(f"if that is only slow, set {LIMIT} (seconds) higher")
    return "\n  ".join(lines)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{LIMIT} is {text!r}: it must be a number of seconds, above 0")
    return seconds
