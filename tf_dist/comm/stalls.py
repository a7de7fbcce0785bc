"""Who keeps the others waiting, and why: from what `Board` shows, without a word between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from tf_dist.comm.words import named
from tf_dist.errors import UsageError

# A rank whose watchdog has not beaten for so long is stopped, dead, or cannot be reached.
SILENT_S = 5.0
# The same, where beats come by messages.
SILENT_FAR_S = 20.0
# A process that uses less than this part of a core sleeps, or waits for something; ours alone take 0.001.
WORKING_SHARE = 0.01
# What `Ending` waits in. Others may have something to do after a training that takes hours.
AT_THE_END = "the end of the job"
# Culprits that are described; the others are counted.
MOST_DESCRIBED = 4


class Limits(NamedTuple):
    """Seconds that a rank waits in a collective; 0 is for ever.

    warn_s: until it says for whom. abort_s: until the job is ended.
    """

    warn_s: float = 60.0
    abort_s: float = 600.0

    def checked(self) -> Limits:
        """Itself.

        Raises:
            UsageError: they cannot hold together.
        """
        check_limits(self.warn_s, self.abort_s)
        return self


class Seen(NamedTuple):
    """A rank as another one sees it.

    here: on the node of the one that looks. process: see `processes.state_of`. silent_s: since its last beat.
    verb: the collective it is in, for waited_s; empty: in none. steps: that it has done.
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
    """What is the matter with a rank."""

    FINE = "fine"
    STOPPED = "stopped"
    DEAD = "dead"
    UNREACHABLE = "unreachable"
    FROZEN = "frozen"
    BLOCKED = "blocked"
    WORKING = "working"
    LEFT = "left"


class Stall(NamedTuple):
    """Ranks wait. first: the one that has waited longest. culprits: for whom; none where all ranks wait."""

    waiters: list[Seen]
    first: Seen
    culprits: list[tuple[Seen, Condition]]

    @property
    def speaker(self) -> int:
        """The rank that says so, and acts."""
        return self.waiters[0].rank

    @property
    def key(self) -> tuple[object, ...]:
        """The same for one stall, whoever looks, and whenever."""
        return self.first.verb, self.first.step, tuple(seen.rank for seen, _ in self.culprits)

    def is_the_end(self) -> bool:
        """Whether all of these ranks have come to the end of their program."""
        return not self.culprits and self.first.verb == AT_THE_END

    def may_end_the_job(self) -> bool:
        """Whether to wait longer would be in vain.

        Who works may be about to come: tokens are prepared, models compiled, before the first step and for as
        long as they take; and after the training one rank may have work to do, or nothing, while others are
        at the end.
        """
        kinds = {kind for _, kind in self.culprits}
        if kinds & {Condition.STOPPED, Condition.DEAD, Condition.UNREACHABLE}:
            return True
        if self.first.verb == AT_THE_END:
            return False
        at_work = (Condition.WORKING, Condition.FROZEN)
        return all(seen.steps for seen, kind in self.culprits if kind in at_work)


def condition(seen: Seen) -> Condition:
    """What is the matter with a rank that has not come to where others wait, or came and does not go on."""
    if seen.process in ("", "Z"):
        return Condition.DEAD
    if seen.process in ("T", "t"):
        return Condition.STOPPED
    if seen.silent_s > (SILENT_S if seen.here else SILENT_FAR_S):
        return Condition.FROZEN if seen.here else Condition.UNREACHABLE
    if seen.verb:
        return Condition.FINE
    return Condition.WORKING if seen.cpu_share >= WORKING_SHARE else Condition.BLOCKED


def judged(everyone: Sequence[Seen]) -> Stall | None:
    """Who waits for whom; None where nobody waits.

    Args:
        everyone: ranks that belong together, in rank order.
    """
    found = [(seen, condition(seen)) for seen in everyone]
    waiters = [seen for seen, kind in found if kind is Condition.FINE]
    culprits: list[tuple[Seen, Condition]] = [
        (seen, kind) for seen, kind in found if kind is not Condition.FINE
    ]
    inside = [seen for seen in waiters if seen.verb != AT_THE_END]
    if inside and not culprits:
        culprits = [(seen, Condition.LEFT) for seen in waiters if seen.verb == AT_THE_END]
    waiters = inside or waiters
    if not waiters:
        return None
    return Stall(waiters, max(waiters, key=lambda seen: seen.waited_s), culprits)


def told(stall: Stall) -> str:
    """What is to be said, on one line; without what becomes of it."""
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


def who(seen: Seen) -> str:
    """A rank, so that somebody can find its process."""
    return f"rank {seen.rank} (pid {seen.pid} on {seen.host})"


def _is(seen: Seen, kind: Condition) -> str:
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
        UsageError: negative, or the job would end before anything was said.
    """
    if warn_s < 0 or abort_s < 0:
        raise UsageError(f"stall_warn is {warn_s:g}, stall_abort {abort_s:g}: seconds, or 0 for never")
    if 0 < abort_s <= warn_s:
        raise UsageError(
            f"stall_abort ({abort_s:g} s) is not beyond stall_warn ({warn_s:g} s): the job would end before "
            f"anybody was warned. Try --stall-abort {10 * warn_s:g}, or 0 for never"
        )
