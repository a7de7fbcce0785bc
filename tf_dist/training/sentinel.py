"""The sentinel: all ranks must hold the same bits, and have called the same number of collectives.

Replicas can part without a word: a flipped bit, a node that rounds differently, code that changes a
variable on one rank. So before the first steps, and every so many after them, each rank takes a digest
of every variable and the ranks compare one number. Only where it differs do they look at the rest, name
the variable and take a vote on who is wrong.

It looks at the beginning of a step, at the weights from which the next gradients will be computed: what
went wrong since the last update is put right before it enters a sum. What went wrong earlier, between two
checks or while gradients were computed, has entered sums that all ranks share, and is not undone.

Legend: R ranks, N variables.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.errors import LaunchError, UsageError

# What the first steps start from: the weights given out, and the results of steps 1, 2 and 3.
FIRST_CHECKS = 4
CHOICES = ("stop", "restore")
ADVICE = (
    "Is all memory sound, are all nodes of one kind, does a callback change weights on one rank only? "
    "The same command goes on from the newest checkpoint"
)


class Split(NamedTuple):
    """A variable that is not the same everywhere; ``astray`` is empty where no majority can tell."""

    place: int
    groups: list[list[int]]
    astray: list[int]


class Sentinel:
    """Compares all ranks' variables and number of collectives, now and then.

    Args:
        comm: all ranks.
        variables: what must be equal: Keras variables by name, in one order on all ranks.
        every: steps between checks; 0: only before the first four steps.
        on_mismatch: "stop", or "restore": ranks that differ from the majority take over its values.

    Attributes:
        say: takes a line when something was put right; prints it on rank 0 unless replaced.

    Raises:
        UsageError: ``every`` is negative, or ``on_mismatch`` is unknown.
    """

    def __init__(
        self, comm: Comm, variables: Sequence[tuple[str, Any]], every: int = 100, on_mismatch: str = "stop"
    ) -> None:
        if on_mismatch not in CHOICES:
            raise UsageError(f"on_mismatch is {on_mismatch!r}: choose one of {', '.join(CHOICES)}")
        if every < 0:
            raise UsageError(f"check_every is {every}: it must be at least 0")
        self.comm, self.variables, self.every, self.on_mismatch = comm, list(variables), every, on_mismatch
        self.say: Callable[[str], None] = self._print
        self._steps_seen = 0

    def watch(self, step: int) -> None:
        """Compare if it is time; called by all ranks at the beginning of each step, a collective then.

        Args:
            step: optimizer steps taken so far.

        Raises:
            LaunchError: as `compare`.
        """
        self._steps_seen += 1
        if self._steps_seen <= FIRST_CHECKS or (self.every and step % self.every == 0):
            self.compare(step)

    def compare(self, step: int) -> None:
        """Compare now, and restore if that was chosen and is possible; a collective.

        Raises:
            LaunchError: on every rank, with the same message, naming ranks and variable: ranks differ.
        """
        splits = self._splits(step)
        if splits and self.on_mismatch == "restore" and all(split.astray for split in splits):
            said = self._described(step, splits)
            for split in splits:
                self._restore(split)
            self.say(f"{said}. Restored from the others")
            splits = self._splits(step)
        if splits:
            raise LaunchError(f"{self._described(step, splits)}{self._why_not_restored(splits)}. {ADVICE}")

    # Comparing -----------------------------------------------------------------------------------

    def _splits(self, step: int) -> list[Split]:
        """The variables that are not equal everywhere."""
        calls = self.comm.calls
        digests_N = [_digest(variable) for _, variable in self.variables]
        together = zlib.crc32(np.array(digests_N, "<u4").data)
        everyone = self.comm.allgather_obj([together, calls])
        self._check_calls(step, [calls for _, calls in everyone])
        if len({digest for digest, _ in everyone}) == 1:
            return []
        digests_RxN = self.comm.allgather_obj(digests_N)
        return [
            _split(place, [digests[place] for digests in digests_RxN])
            for place in range(len(self.variables))
            if len({digests[place] for digests in digests_RxN}) > 1
        ]

    def _check_calls(self, step: int, calls_R: list[int]) -> None:
        if len(set(calls_R)) == 1:
            return
        split = _split(0, calls_R)
        counts = ", ".join(f"{calls_R[ranks[0]]} on {_ranks(ranks)}" for ranks in split.groups)
        who = _ranks(split.astray) if split.astray else "some ranks"
        raise LaunchError(
            f"before step {step + 1} the ranks have called different numbers of collectives: {counts}. "
            f"{who[0].upper()}{who[1:]} left one out or called one more, perhaps inside `if comm.rank == 0`, "
            "so results may have gone to the wrong call. TF_DIST_DEBUG=1 finds the line"
        )

    def _described(self, step: int, splits: list[Split]) -> str:
        first = splits[0]
        name = self.variables[first.place][0]
        many = f" (and {len(splits) - 1} more of {len(self.variables)} variables)" if len(splits) > 1 else ""
        if first.astray:
            others = _ranks([rank for group in first.groups for rank in group if rank not in first.astray])
            verb = "differs" if len(first.astray) == 1 else "differ"
            who = f"{_ranks(first.astray)} {verb} from {others}"
        else:
            who = " and ".join(_ranks(group) for group in first.groups) + " differ"
        return f"before step {step + 1} the ranks no longer hold the same model: {who} in {name}{many}"

    def _why_not_restored(self, splits: list[Split]) -> str:
        if self.on_mismatch == "stop":
            return ""
        if all(split.astray for split in splits):
            return ", and still do after they were restored"
        return ". Nothing was restored: no majority of ranks can tell which of them is right"

    # Restoring -----------------------------------------------------------------------------------

    def _restore(self, split: Split) -> None:
        """Give one variable of a majority rank to those that differ; a collective."""
        variable = self.variables[split.place][1]
        array = np.array(np.asarray(variable.value))  # a copy: it is written to
        root = min(rank for group in split.groups for rank in group if rank not in split.astray)
        self.comm.broadcast(array.reshape(-1), root)
        if self.comm.rank in split.astray:
            variable.assign(array)

    def _print(self, text: str) -> None:
        if self.comm.rank == 0:
            print(text, flush=True)


def _digest(variable: Any) -> int:
    """CRC-32 of a variable's bytes: one flipped bit, or any within 32 neighbours, never goes unseen."""
    return zlib.crc32(np.ascontiguousarray(np.asarray(variable.value)).reshape(-1).view(np.uint8).data)


def _split(place: int, values_R: Sequence[int]) -> Split:
    """Ranks by value, the largest group first, and those outvoted by more than half of all ranks."""
    counts = Counter(values_R).most_common()
    groups = [[rank for rank, value in enumerate(values_R) if value == wanted] for wanted, _ in counts]
    outvoted = 2 * counts[0][1] > len(values_R)
    return Split(place, groups, sorted(rank for group in groups[1:] for rank in group) if outvoted else [])


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))
