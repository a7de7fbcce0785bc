"""The consistency check: all ranks must hold the same bits, and have called as many collectives.

Replicas can diverge silently: a flipped bit, a node that rounds differently, code that changes a variable on
one rank. So before the first steps, and periodically after them, each rank computes a digest of every
variable, and the ranks compare one number. Only if it differs do they compare single variables, name the
first one that differs, and decide by majority vote which ranks are wrong.

A check runs at the beginning of a step, on the weights from which the next gradients are computed. A replica
that was wrong earlier has contributed to sums that all ranks share: if ranks are restored, `Replay` undoes
that as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tf_dist.comm.formatting import named
from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import LaunchError, UsageError
from tf_dist.keras_callbacks.digests import Divergence, split, splits
from tf_dist.training.guards import StepGuard, StepResult, Verdict
from tf_dist.training.replay import Replay
from tf_dist.training.train_state import TrainState

LOG = logging.getLogger(__name__)
# Checks before the first steps: of the broadcast weights, and of the results of steps 1, 2 and 3.
FIRST_CHECKS = 4
CHOICES = ("stop", "restore")
ADVICE = (
    "Does a callback change weights on one rank only, or a layer while it trains? Is all memory sound, are "
    "all nodes of one kind? "
    "Repeat the command to resume from the newest checkpoint"
)


class ReplicaGroup(NamedTuple):
    """Replicated Keras variables, by name, in the same order on all ranks of a Comm.

    held: whether this rank holds them; at least one rank must.
    """

    comm: Comm
    variables: Sequence[tuple[str, Any]]
    held: bool = True


class ConsistencyCheck(StepGuard):
    """Compares all ranks' variables and number of collectives, periodically.

    Args:
        comm: all ranks.
        groups: of this rank, as many on every rank; if ranks have different parts of a model, each part is
            held by a group of its own.
        every: steps between checks; 0: only before the first four steps.
        on_mismatch: "stop", or "restore": ranks that differ from the majority take over its values.
        in_sync: whether ranks must be equal now, the same on all; until they are, a check is postponed.
        replay: keeps each verified state, and repeats the steps after it where ranks were restored; None: no
            step is repeated.

    Raises:
        UsageError: ``every`` is negative, or ``on_mismatch`` is unknown.
    """

    def __init__(
        self,
        comm: Comm,
        groups: Sequence[ReplicaGroup],
        every: int = 100,
        on_mismatch: str = "stop",
        *,
        in_sync: Callable[[], bool] = lambda: True,
        replay: Replay | None = None,
    ) -> None:
        if on_mismatch not in CHOICES:
            raise UsageError(f"on_mismatch is {on_mismatch!r}: choose one of {', '.join(CHOICES)}")
        if every < 0:
            raise UsageError(f"check_every is {every}: it must be at least 0")
        self.comm, self.groups, self.every, self.on_mismatch = comm, list(groups), every, on_mismatch
        self._in_sync, self._replay = in_sync, replay
        self._steps_seen, self._due, self._restored = 0, False, False

    def before(self, state: TrainState) -> None:
        """Compare if a check is due."""
        self.watch(state.step)

    def after(self, state: TrainState, result: StepResult) -> Verdict:
        """Compare if no weight has changed, as a corrupted replica may be the reason; RETRY if restored."""
        if not result.taken and self._in_sync() and self.compare(state.step):
            return Verdict.RETRY
        return Verdict.OK

    def watch(self, step: int) -> None:
        """Compare if a check is due; a collective then. Called by all ranks at the beginning of each step.

        Args:
            step: optimizer steps taken so far.

        Raises:
            LaunchError: as `compare`.
        """
        self._steps_seen += 1
        self._due |= self._steps_seen <= FIRST_CHECKS or bool(self.every and step % self.every == 0)
        if self._due and self._in_sync():
            self.compare(step)
            self._due = False

    def restart(self) -> None:
        """Compare the surviving ranks before their next steps, as before the first ones."""
        self._steps_seen, self._due = 0, False

    def compare(self, step: int) -> bool:
        """Compare now, and restore if ``on_mismatch`` says so and a majority is right; a collective.

        Returns:
            Whether any rank was restored.

        Raises:
            LaunchError: on every rank, with the same message, naming ranks and variable: ranks differ.
        """
        if self._replay is not None:
            self._replay.finish()
        self._check_calls(step)
        self._restored = False
        mismatches = [self._mismatch(step, group) for group in self.groups]
        # Only the ranks of a group know of its mismatch, and all ranks must end together.
        mismatch = next(filter(None, mismatches), "")
        if any(group.comm is not self.comm for group in self.groups):
            of_all = self.comm.allgather_obj([mismatch, self._restored])
            mismatch = next(filter(None, (text for text, _ in of_all)), "")
            self._restored = any(restored for _, restored in of_all)
        if mismatch:
            raise LaunchError(f"{mismatch}. {ADVICE}")
        if self._replay is not None:
            self._replay.keep(step)
        return self._restored

    def _mismatch(self, step: int, group: ReplicaGroup) -> str:
        """Describe the mismatch of a group that could not be restored; empty if there is none."""
        found = self._splits(group)
        if found and self.on_mismatch == "restore" and all(one.outvoted for one in found):
            description = self._described(step, group, found)
            for one in found:
                self._restore(group, one)
            replayed = "" if self._replay is None else self._replay.take_again(step)
            self._restored = True
            once(LOG, self.comm).warning(f"{description}. Restored from the others{replayed}")
            found = self._splits(group)
        return f"{self._described(step, group, found)}{self._why_not_restored(found)}" if found else ""

    # Comparing -----------------------------------------------------------------------------------

    def _splits(self, group: ReplicaGroup) -> list[Divergence]:
        """The variables that differ between the ranks of a group that hold them."""
        return splits([variable for _, variable in group.variables], group.comm, group.held)

    def _check_calls(self, step: int) -> None:
        calls_R = self.comm.calls_of_all()
        if len(set(calls_R)) == 1:
            return
        found = split(0, dict(enumerate(calls_R)))
        counts = ", ".join(f"{calls_R[ranks[0]]} on {named(ranks)}" for ranks in found.groups)
        who = named(found.outvoted) if found.outvoted else "some ranks"
        raise LaunchError(
            f"before step {step + 1} the ranks have called different numbers of collectives: {counts}. "
            f"{who[0].upper()}{who[1:]} left one out or called one more, perhaps inside `if comm.rank == 0`, "
            "so results may have gone to the wrong call. TF_DIST_DEBUG=1 finds the line"
        )

    def _described(self, step: int, group: ReplicaGroup, found: list[Divergence]) -> str:
        # The name on its first rank, for all: Keras numbers layers per process.
        name = group.comm.broadcast_obj(group.variables[found[0].place][0])
        first = found[0]
        if group.comm is not self.comm:  # a group counts its ranks from 0
            first = first.renamed(group.comm.allgather_obj(self.comm.rank))
        many = f" (and {len(found) - 1} more of {len(group.variables)} variables)" if len(found) > 1 else ""
        return f"before step {step + 1} the ranks no longer hold the same model: {first.who} in {name}{many}"

    def _why_not_restored(self, found: list[Divergence]) -> str:
        if self.on_mismatch == "stop":
            return ""
        if all(one.outvoted for one in found):
            return ", and still do after they were restored"
        return ". Nothing was restored: no majority of ranks can tell which of them is right"

    # Restoring -----------------------------------------------------------------------------------

    def _restore(self, group: ReplicaGroup, found: Divergence) -> None:
        """Broadcast one variable from a majority rank to those that differ; a collective of the group."""
        variable = group.variables[found.place][1]
        if group.held:
            array = np.array(np.asarray(variable.value))  # a writable copy
        else:  # a receive buffer: this rank has no such variable
            array = np.empty(variable.shape, variable.dtype)
        root = min(rank for group in found.groups for rank in group if rank not in found.outvoted)
        group.comm.broadcast(array.reshape(-1), root)
        if group.comm.rank in found.outvoted:
            variable.assign(array)
