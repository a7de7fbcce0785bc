"""Skip steps with non-finite gradients, and report the ranks and tensors in which they began.

The norm of the summed gradient is the same on every rank, and is not finite if any element is not, so the
skip needs no extra communication. A skipped step leaves weights and optimizer unchanged, its count of steps
included, and uses up its batch. Only then do ranks search for the cause. First the consistency check compares
them: a flipped bit may be the reason. Then each rank recomputes its gradients, finds the first tensor that is
not finite, and all ranks exchange what they have found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from tf_dist import faults
from tf_dist.checkpoint.sharded_state import ShardedState
from tf_dist.comm.formatting import named
from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import NumericError, UsageError
from tf_dist.parallel.totals import ADVICE, LOSS, TOKENS, Totals
from tf_dist.runners.replica import FlatParameters
from tf_dist.training.guards import StepGuard, StepResult, Verdict
from tf_dist.training.train_state import TrainState

LOG = logging.getLogger(__name__)


class NonFiniteGradients(StepGuard):
    """Counts skipped steps, and ends the run after too many consecutive ones.

    Args:
        comm: all ranks.
        replica: this rank's.
        whole: the sharded state; a collective.
        most: consecutive steps that are skipped; one more ends the run. 0: the first one does.

    Attributes:
        before_giving_up: called on all ranks before the run is ended, with the last good weights.

    Raises:
        UsageError: ``most`` is negative.
    """

    def __init__(
        self, comm: Comm, replica: FlatParameters, whole: Callable[[], ShardedState], most: int
    ) -> None:
        if most < 0:
            raise UsageError(f"max_bad_steps is {most}: it must be at least 0")
        self._comm, self._replica, self._whole = comm, replica, whole
        self.most = most
        self.before_giving_up: list[Callable[[], None]] = []
        self._found = "the gradient is not finite"

    def after(self, state: TrainState, result: StepResult) -> Verdict:
        """Count a skipped step.

        Raises:
            NumericError: on every rank: weights are not finite, so no later gradient can be.
        """
        if result.taken:
            state.skipped.in_a_row = 0
        else:
            self._note(state, result)
        return Verdict.OK

    def _note(self, state: TrainState, result: StepResult) -> None:
        norm, _, totals, runner, batches = result
        counts, local_gradients = totals.sum(), runner.local_gradients
        parts = runner.recompute_gradients(state.step, batches(), Totals(totals.micro_batches))
        first = self._first(parts, local_gradients)
        of_all = self._comm.allgather_obj([first, self._first_weight()])
        loss = counts[LOSS] / max(counts[TOKENS], 1.0)
        self._found = (
            f"the gradient is not finite (norm {norm}, mean loss {loss:.4g}): "
            f"{_where([gradient for gradient, _ in of_all], local_gradients)}"
        )
        if without := totals.not_finite():
            many = "es" * (len(without) > 1)
            self._found += f"; without a finite loss: micro-batch{many} {', '.join(map(str, without))}"
        weights = [weight for _, weight in of_all]
        if any(weights):
            raise NumericError(
                f"in step {state.step + 1} {self._found}. Nor are weights finite "
                f"({_where(weights, True)}), so no later step could be. {ADVICE}"
            )
        state.skipped.total += 1
        state.skipped.in_a_row += 1
        if state.skipped.in_a_row <= self.most:
            text = f"step {state.step + 1} was skipped ({self._counted(state)}): {self._found}"
            once(LOG, self._comm).warning(text)

    def settle(self, state: TrainState, logs: Mapping[str, float]) -> None:
        """End the run after too many consecutive skipped steps.

        Raises:
            NumericError: on every rank.
        """
        if state.skipped.in_a_row <= self.most:
            return
        counted, state.skipped.in_a_row = self._counted(state), 0
        for save in self.before_giving_up:
            save()
        raise NumericError(
            f"in step {state.step} {self._found}, and no weight has changed ({counted}). {ADVICE}"
        )

    def _counted(self, state: TrainState) -> str:
        return f"{state.skipped.in_a_row} in a row, and --max-bad-steps is {self.most}"

    def _first(self, parts: Iterable[np.ndarray], local_gradients: bool) -> str:
        """The first non-finite tensor of this rank's recomputed gradients; empty if there is none."""
        shard = None if local_gradients else self._replica.own_shard
        return first_not_finite(parts, self._replica, shard.start if shard else 0)

    def _first_weight(self) -> str:
        """The first weight of which this rank holds a non-finite element; empty if none. A collective."""
        for entry in self._whole().weights:
            if not all(np.isfinite(piece.read()).all() for piece in entry.pieces):
                return entry.name.split("/", 2)[2]
        return ""


def first_not_finite(parts: Iterable[np.ndarray], replica: FlatParameters, start: int = 0) -> str:
    """The path of the first variable whose gradient is not finite; empty if there is none.

    Args:
        parts: gradients, (S,) each.
        replica: whose variables and layout these are.
        start: offset of their first element in the layout.
    """
    first = ""
    for number, part in enumerate(parts):  # to the end: others may be waiting for this rank's part in it
        if number == 0:
            faults.inject_nan([part])
        if not first and (places := np.flatnonzero(~np.isfinite(part))).size:
            place = int(np.searchsorted(replica.layout.starts, places[0] + start, "right")) - 1
            first = str(replica.variables[place].path)
    return first


def _where(found: Sequence[str], local_gradients: bool) -> str:
    """Describe the paths that the ranks have found, an empty one for a rank without any."""
    if not any(found):
        return "recomputed, those of all ranks are finite: a transient fault, or only their sum overflows"
    if not local_gradients:
        return f"first in {next(filter(None, found))}"
    ranks: dict[str, list[int]] = {}
    for rank, path in enumerate(found):
        if path:
            ranks.setdefault(path, []).append(rank)
    return "; ".join(f"on {named(those)}, first in {path}" for path, those in ranks.items())
