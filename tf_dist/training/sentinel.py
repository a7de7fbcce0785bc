"""The sentinel: all ranks must hold the same bits, and have called the same number of collectives.

Replicas can part without a word: a flipped bit, a node that rounds differently, code that changes a
variable on one rank. So before the first steps, and every so many after them, each rank takes a digest
of every variable and the ranks compare one number. Only where it differs do they look at the rest, name
the variable and take a vote on who is wrong.

It looks at the beginning of a step, at the weights from which the next gradients will be computed. What went
wrong before, between two checks or while gradients were computed, has entered sums that all ranks share:
where ranks are restored, `Verified` undoes that as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tf_dist import terminal
from tf_dist.comm.base import Comm
from tf_dist.comm.words import named
from tf_dist.errors import LaunchError, UsageError
from tf_dist.training.compare import Split, split, splits

# What the first steps start from: the weights given out, and the results of steps 1, 2 and 3.
FIRST_CHECKS = 4
CHOICES = ("stop", "restore")
ADVICE = (
    "Is all memory sound, are all nodes of one kind, does a callback change weights on one rank only? "
    "The same command goes on from the newest checkpoint"
)


class Group(NamedTuple):
    """What must be equal on the ranks of a Comm that hold it: Keras variables by name, in one order on all.

    held: whether this rank does; at least one rank must.
    """

    comm: Comm
    variables: Sequence[tuple[str, Any]]
    held: bool = True


class Sentinel:
    """Compares all ranks' variables and number of collectives, now and then.

    Args:
        comm: all ranks.
        groups: of this rank, as many on every rank; where ranks have different parts of a model, each part is
            held by a group of its own.
        every: steps between checks; 0: only before the first four steps.
        on_mismatch: "stop", or "restore": ranks that differ from the majority take over its values.

    Attributes:
        say: takes a line when something was put right; prints it on rank 0 unless replaced.
        keep: told after how many steps all were found equal.
        take_again: called with a step after which ranks were restored; undoes what followed from the
            difference, on all ranks, and says so.
        finish: called before all else, on all ranks, with what a death may have interrupted in it.
        ready: whether ranks are to be equal now, the same on all; where not, a check waits until they are.

    Raises:
        UsageError: ``every`` is negative, or ``on_mismatch`` is unknown.
    """

    def __init__(
        self, comm: Comm, groups: Sequence[Group], every: int = 100, on_mismatch: str = "stop"
    ) -> None:
        if on_mismatch not in CHOICES:
            raise UsageError(f"on_mismatch is {on_mismatch!r}: choose one of {', '.join(CHOICES)}")
        if every < 0:
            raise UsageError(f"check_every is {every}: it must be at least 0")
        self.comm, self.groups, self.every, self.on_mismatch = comm, list(groups), every, on_mismatch
        self.say: Callable[[str], None] = self._print
        self.ready: Callable[[], bool] = lambda: True
        self.keep: Callable[[int], None] = lambda step: None
        self.take_again: Callable[[int], str] = lambda step: ""
        self.finish: Callable[[], None] = lambda: None
        self._steps_seen, self._due, self._restored = 0, False, False

    def watch(self, step: int) -> None:
        """Compare if it is time; called by all ranks at the beginning of each step, a collective then.

        Args:
            step: optimizer steps taken so far.

        Raises:
            LaunchError: as `compare`.
        """
        self._steps_seen += 1
        self._due |= self._steps_seen <= FIRST_CHECKS or bool(self.every and step % self.every == 0)
        if self._due and self.ready():
            self.compare(step)
            self._due = False

    def begin_anew(self) -> None:
        """Ranks have died: the others compare themselves before their next steps, as before the first."""
        self._steps_seen, self._due = 0, False

    def compare(self, step: int) -> bool:
        """Compare now, and restore if that was chosen and is possible; a collective.

        Returns:
            Whether something was put right, on any rank.

        Raises:
            LaunchError: on every rank, with the same message, naming ranks and variable: ranks differ.
        """
        self.finish()
        self._check_calls(step)
        self._restored = False
        troubles = [self._trouble(step, group) for group in self.groups]
        # A group's ranks know of their own trouble, and all must end together.
        told = next(filter(None, troubles), "")
        if any(group.comm is not self.comm for group in self.groups):
            everyone = self.comm.allgather_obj([told, self._restored])
            told = next(filter(None, (said for said, _ in everyone)), "")
            self._restored = any(restored for _, restored in everyone)
        if told:
            raise LaunchError(f"{told}. {ADVICE}")
        self.keep(step)
        return self._restored

    def _trouble(self, step: int, group: Group) -> str:
        """What is wrong in a group, after it was put right where that was chosen and is possible."""
        found = self._splits(group)
        if found and self.on_mismatch == "restore" and all(one.astray for one in found):
            said = self._described(step, group, found)
            for one in found:
                self._restore(group, one)
            again = self.take_again(step)
            self._restored = True
            self.say(f"{said}. Restored from the others{again}")
            found = self._splits(group)
        return f"{self._described(step, group, found)}{self._why_not_restored(found)}" if found else ""

    # Comparing -----------------------------------------------------------------------------------

    def _splits(self, group: Group) -> list[Split]:
        """The variables that are not equal on all ranks of a group that hold them."""
        return splits([variable for _, variable in group.variables], group.comm, group.held)

    def _check_calls(self, step: int) -> None:
        calls_R = self.comm.calls_of_all()
        if len(set(calls_R)) == 1:
            return
        found = split(0, dict(enumerate(calls_R)))
        counts = ", ".join(f"{calls_R[ranks[0]]} on {named(ranks)}" for ranks in found.groups)
        who = named(found.astray) if found.astray else "some ranks"
        raise LaunchError(
            f"before step {step + 1} the ranks have called different numbers of collectives: {counts}. "
            f"{who[0].upper()}{who[1:]} left one out or called one more, perhaps inside `if comm.rank == 0`, "
            "so results may have gone to the wrong call. TF_DIST_DEBUG=1 finds the line"
        )

    def _described(self, step: int, group: Group, found: list[Split]) -> str:
        # Its first rank's name for all: Keras numbers layers in each process by itself.
        name = group.comm.broadcast_obj(group.variables[found[0].place][0])
        first = found[0]
        if group.comm is not self.comm:  # a group counts its ranks from 0
            first = first.renamed(group.comm.allgather_obj(self.comm.rank))
        many = f" (and {len(found) - 1} more of {len(group.variables)} variables)" if len(found) > 1 else ""
        return f"before step {step + 1} the ranks no longer hold the same model: {first.who} in {name}{many}"

    def _why_not_restored(self, found: list[Split]) -> str:
        if self.on_mismatch == "stop":
            return ""
        if all(one.astray for one in found):
            return ", and still do after they were restored"
        return ". Nothing was restored: no majority of ranks can tell which of them is right"

    # Restoring -----------------------------------------------------------------------------------

    def _restore(self, group: Group, found: Split) -> None:
        """Give one variable of a majority rank to those that differ; a collective of the group."""
        variable = group.variables[found.place][1]
        if group.held:
            array = np.array(np.asarray(variable.value))  # a copy: it is written to
        else:  # what it takes over is not for this rank
            array = np.empty(variable.shape, variable.dtype)
        root = min(rank for group in found.groups for rank in group if rank not in found.astray)
        group.comm.broadcast(array.reshape(-1), root)
        if group.comm.rank in found.astray:
            variable.assign(array)

    def _print(self, text: str) -> None:
        if self.comm.rank == 0:
            terminal.write(text)
