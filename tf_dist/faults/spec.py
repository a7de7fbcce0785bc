"""Parser of TF_DIST_FAULT; strict, as a fault that is not injected proves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tf_dist.errors import UsageError
from tf_dist.spelling import did_you_mean

VARIABLE = "TF_DIST_FAULT"

# Injection points, in the order of a run.
PHASES = {
    "load": "a checkpoint is about to be read",
    "step": "a step begins; replicas have not been compared yet",
    "forward": "replicas have been compared; no gradient is made yet",
    "gradient": "this rank's gradients are made; the others have not got them",
    "allreduce": "losses are summed over ranks, gradients are not",
    "update": "gradients are summed, weights are the old ones",
    "validation": "a validation begins",
    "save": "a checkpoint is about to be written",
}
# Those inside a step.
OF_A_STEP = ("step", "forward", "gradient", "allreduce", "update")
FOR_EVER = 1 << 62


class Kind(NamedTuple):
    """Parameters of a kind of fault.

    phases: where it may be injected; the first one is the default. keys: besides rank, step and phase.
    needs: those of them without a default. times: default number of consecutive steps.
    """

    phases: tuple[str, ...]
    keys: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    times: int = 1


ANYWHERE = ("step", *(phase for phase in PHASES if phase != "step"))
KINDS = {
    "kill": Kind(ANYWHERE),
    "stop": Kind(ANYWHERE),
    "raise": Kind(ANYWHERE),
    "exit": Kind(ANYWHERE, ("code",)),
    "segv": Kind(ANYWHERE),
    "slow": Kind(ANYWHERE, ("ms", "times"), ("ms",), FOR_EVER),
    "nan": Kind(("gradient",), ("seed", "times")),
    "bitflip": Kind(("step", "forward", "gradient", "update"), ("seed", "bits")),
    "diskfull": Kind(ANYWHERE),
    "partial": Kind(("save",), ("call",)),
}
# Lower bound of each numeric key.
LEAST = {"rank": 0, "step": 1, "times": 1, "ms": 0, "seed": 0, "bits": 1, "call": 1, "code": 0}


class Fault(NamedTuple):
    """One fault.

    rank: as numbered when the job began; None: every rank. step: the first in which it is injected, counted
    from 1. times: steps, of `slow` and `nan`. ms: of `slow`. seed: chooses the place of `nan` and `bitflip`.
    bits: flipped by `bitflip`, in one weight. call: index of the write of a save that `partial` truncates.
    code: of `exit`.
    """

    kind: str
    phase: str
    rank: int | None = None
    step: int = 1
    times: int = 1
    ms: int = 0
    seed: int = 1
    bits: int = 1
    call: int = 1
    code: int = 1

    def hits(self, rank: int) -> bool:
        """Whether it applies to a rank."""
        return self.rank is None or self.rank == rank

    def __str__(self) -> str:
        where = "every rank" if self.rank is None else f"rank {self.rank}"
        when = "" if self.phase == "load" else f", from step {self.step} on"
        return f"{self.kind} on {where} in phase {self.phase}{when}"


def parse(text: str) -> list[Fault]:
    """The faults of ``kind:key=value,...;kind:...``.

    Raises:
        UsageError: an unknown kind, key or phase, or an invalid value.
    """
    return [_fault(part.strip()) for part in text.split(";") if part.strip()]


def _fault(part: str) -> Fault:
    name, _, rest = part.partition(":")
    name = name.strip()
    if name not in KINDS:
        raise _refusal(part, f"there is no kind {name!r}", name, list(KINDS))
    kind = KINDS[name]
    words = _words(part, rest, ("rank", "step", "phase", *kind.keys))
    missing = [key for key in kind.needs if key not in words]
    if missing:
        raise _refusal(part, f"{name} needs {missing[0]}=N")
    phase = words.pop("phase", kind.phases[0])
    if phase not in kind.phases:
        what = (
            f"{name} cannot strike in phase {phase!r}" if phase in PHASES else f"there is no phase {phase!r}"
        )
        raise _refusal(part, what, phase, list(kind.phases))
    if phase == "load" and "step" in words:
        raise _refusal(part, "in phase load no step has been taken: leave step away")
    numbers = {key: _number(part, key, value) for key, value in words.items()}
    return Fault(name, phase, **{"times": kind.times, **numbers})


def _words(part: str, rest: str, known: Sequence[str]) -> dict[str, str]:
    """``key=value`` by key."""
    words: dict[str, str] = {}
    for word in filter(None, (word.strip() for word in rest.split(","))):
        key, equals, value = (side.strip() for side in word.partition("="))
        if not equals or not value:
            raise _refusal(part, f"{word!r} is not key=value")
        if key not in known:
            raise _refusal(part, f"there is no key {key!r}", key, known)
        if key in words:
            raise _refusal(part, f"{key} is given twice")
        words[key] = value
    return words


def _number(part: str, key: str, value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        raise _refusal(part, f"{key} is {value!r}, not a whole number") from None
    if number < LEAST[key]:
        raise _refusal(part, f"{key} is {number}: it must be at least {LEAST[key]}")
    return number


def _refusal(part: str, what: str, word: str = "", known: Sequence[str] = ()) -> UsageError:
    choices = f": {', '.join(known)}" if known else ""
    return UsageError(f"{VARIABLE} {part!r}: {what}{choices}{did_you_mean(word, known) if known else ''}")
