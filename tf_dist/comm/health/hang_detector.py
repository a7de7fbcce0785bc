"""Which ranks keep others waiting, and why: decided from the `StatusBoard`, without communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from tf_dist.comm.formatting import named
from tf_dist.errors import UsageError
from tf_dist.options import Options, option

# A rank whose watchdog has been silent for this long is stopped, has failed, or is unreachable.
SILENT_S = 5.0
# The same for other nodes, whose heartbeats arrive by message.
SILENT_FAR_S = 20.0
# A process that uses less than this fraction of a core is idle or waiting; our own threads use 0.001.
WORKING_SHARE = 0.01
# The verb that `JobExit` waits in. Other ranks may still have work after a training of many hours.
AT_THE_END = "the end of the job"
# Number of culprits that are described; the rest are counted.
MOST_DESCRIBED = 4


@dataclass(frozen=True)
class StallOptions(Options):
    """How long a rank waits for the others, by the names of flags: see `Limits`."""

    stall_warn: float = option(
        60.0,
        "checkpoints and recovery",
        "seconds that ranks wait for another one before they report it, and what it does; 0: never",
        least=0,
        on_resume="free",
    )
    stall_abort: float = option(
        600.0,
        "checkpoints and recovery",
        "seconds after which they end the job, with 70; 0: never. A rank that still prepares or compiles is "
        "given time",
        least=0,
        on_resume="free",
    )

    def check(self) -> None:
        """As `check_limits`."""
        check_limits(self.stall_warn, self.stall_abort)


class Limits(NamedTuple):
    """Limits on waiting in a collective, in seconds; 0 is never.

    warn_s: until a rank reports whom it waits for. abort_s: until the job is ended.
    """

    warn_s: float = StallOptions.stall_warn
    abort_s: float = StallOptions.stall_abort

    def checked(self) -> Limits:
        """Validate, and return itself.

        Raises:
            UsageError: the limits contradict each other.
        """
        check_limits(self.warn_s, self.abort_s)
        return self


class PeerStatus(NamedTuple):
    """A rank as another one sees it.

    here: it runs on the observer's node. process: see `processes.state_of`. silent_s: since its last
    heartbeat.
    verb: the collective it is in, for waited_s; empty: none. steps: completed.
    """

    rank: int
    host: str
    pid: int
    here: bool
    process: str
    silent_s: float
    verb: str
    waited_s: float
    step: int
    steps: int
    cpu_share: float
    where: str


class Condition(Enum):
    """Why a rank does not arrive."""

    FINE = "fine"
    STOPPED = "stopped"
    DEAD = "dead"
    UNREACHABLE = "unreachable"
    FROZEN = "frozen"
    BLOCKED = "blocked"
    WORKING = "working"
    LEFT = "left"


class Hang(NamedTuple):
    """Ranks wait. first: the longest waiting rank. culprits: the missing ranks; empty if all ranks wait."""

    waiters: list[PeerStatus]
    first: PeerStatus
    culprits: list[tuple[PeerStatus, Condition]]

    @property
    def speaker(self) -> int:
        """The rank that reports the hang, and acts."""
        return self.waiters[0].rank

    @property
    def key(self) -> tuple[object, ...]:
        """Identity of a hang: equal for every observer, at any time."""
        return self.first.verb, self.first.step, tuple(seen.rank for seen, _ in self.culprits)

    def all_at_the_end(self) -> bool:
        """Whether all of these ranks have reached the end of their program."""
        return not self.culprits and self.first.verb == AT_THE_END

    def may_abort(self) -> bool:
        """Whether waiting longer is pointless.

        A rank that is computing may still arrive: tokens are prepared and models compiled before the first
        step, for as long as that takes; and after the training one rank may have work left while others have
        reached the end.
        """
        kinds = {kind for _, kind in self.culprits}
        if kinds & {Condition.STOPPED, Condition.DEAD, Condition.UNREACHABLE}:
            return True
        if self.first.verb == AT_THE_END:
            return False
        at_work = (Condition.WORKING, Condition.FROZEN)
        return all(seen.steps for seen, kind in self.culprits if kind in at_work)


def condition(seen: PeerStatus) -> Condition:
    """Classify a rank that has not arrived where others wait, or that arrived and does not continue."""
    if seen.process in ("", "Z"):
        return Condition.DEAD
    if seen.process in ("T", "t"):
        return Condition.STOPPED
    if seen.silent_s > (SILENT_S if seen.here else SILENT_FAR_S):
        return Condition.FROZEN if seen.here else Condition.UNREACHABLE
    if seen.verb:
        return Condition.FINE
    return Condition.WORKING if seen.cpu_share >= WORKING_SHARE else Condition.BLOCKED


def detect_hang(everyone: Sequence[PeerStatus]) -> Hang | None:
    """Detect a hang; None if no rank waits.

    Args:
        everyone: ranks that communicate with each other, in rank order.
    """
    found = [(seen, condition(seen)) for seen in everyone]
    waiters = [seen for seen, kind in found if kind is Condition.FINE]
    culprits: list[tuple[PeerStatus, Condition]] = [
        (seen, kind) for seen, kind in found if kind is not Condition.FINE
    ]
    inside = [seen for seen in waiters if seen.verb != AT_THE_END]
    if inside and not culprits:
        culprits = [(seen, Condition.LEFT) for seen in waiters if seen.verb == AT_THE_END]
    waiters = inside or waiters
    if not waiters:
        return None
    return Hang(waiters, max(waiters, key=lambda seen: seen.waited_s), culprits)


def told(stall: Hang) -> str:
    """One line that describes the hang, without its consequences."""
    first = stall.first
    verb = f"`{first.verb}`" if " " in first.verb and first.verb != AT_THE_END else first.verb
    what = f"{verb} of step {first.step}" if first.step and first.verb != AT_THE_END else verb
    if not stall.culprits:
        where = "; ".join(f"{named([seen.rank])} in {seen.verb}" for seen in stall.waiters[:MOST_DESCRIBED])
        return (
            f"all ranks have waited for {first.waited_s:.0f} s in {what} ({where}). Do they call collectives "
            "in different orders (TF_DIST_DEBUG=1 finds the line), or is the network down or slow?"
        )
    said = [f"{who(seen)} {_is(seen, kind)}" for seen, kind in stall.culprits[1:MOST_DESCRIBED]]
    more = len(stall.culprits) - MOST_DESCRIBED
    seen, kind = stall.culprits[0]
    lines = [
        f"{who(seen)} has not come to {what} for {first.waited_s:.0f} s: it {_is(seen, kind)}",
        *said,
        *([f"and {more} more ranks"] if more > 0 else []),
    ]
    return "; ".join(lines)


def who(seen: PeerStatus) -> str:
    """A rank with host and process id, so that a user can find the process."""
    return f"rank {seen.rank} (pid {seen.pid} on {seen.host})"


def _is(seen: PeerStatus, kind: Condition) -> str:
    where = f" in {seen.where}" if seen.where else ""
    busy = f"{100 * min(seen.cpu_share, 99.0):.0f} % of a core"
    texts = {
        Condition.STOPPED: f"is stopped (SIGSTOP). kill -CONT {seen.pid} lets it go on",
        Condition.DEAD: "is dead",
        Condition.UNREACHABLE: (
            f"cannot be reached: nothing was heard from that host for {seen.silent_s:.0f} s. Is the host or "
            "the network down, or its first rank stopped?"
        ),
        Condition.FROZEN: (
            f"is alive (state {seen.process}), but no Python thread of it has run for {seen.silent_s:.0f} s: "
            "something outside Python holds its lock"
        ),
        Condition.BLOCKED: f"sleeps or is blocked{where}",
        Condition.WORKING: f"is at work ({busy}){where}: it is slow, or in an endless loop",
        Condition.LEFT: "has come to the end of its program",
    }
    return texts[kind]


def check_limits(warn_s: float, abort_s: float) -> None:
    """Check the limits of a wait for other ranks: stall_warn and stall_abort, seconds, 0 for never.

    Raises:
        UsageError: negative, or the job would end before the first warning.
    """
    if warn_s < 0 or abort_s < 0:
        raise UsageError(f"stall_warn is {warn_s:g}, stall_abort {abort_s:g}: seconds, or 0 for never")
    if 0 < abort_s <= warn_s:
        raise UsageError(
            f"stall_abort ({abort_s:g} s) is not beyond stall_warn ({warn_s:g} s): the job would end before "
            f"anybody was warned. Try --stall-abort {10 * warn_s:g}, or 0 for never"
        )
