"""Steps whose gradient is not a number: all ranks skip them, and say where it came from.

The norm of the summed gradient is the same on every rank, and is not finite where any part of it is not: all
know it from what they exchange anyway. Nobody steps then: weights and optimizer, its count of steps
included, stay what they were, while the batch counts as used. Only in such a step do ranks look further.
First the sentinel compares them: a flipped bit may have done it. Then each makes its gradients once more,
looks for the first tensor that is not finite, and one exchange tells all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tf_dist import faults
from tf_dist.comm import output
from tf_dist.comm.words import named
from tf_dist.errors import NumericError, UsageError
from tf_dist.parallel.totals import ADVICE, LOSS, TOKENS, Totals

if TYPE_CHECKING:
    from tf_dist.training.passes import MicroBatch
    from tf_dist.training.trainer import Trainer


class BadSteps:
    """Counts steps that were skipped, and ends the run where too many come one after another.

    Args:
        trainer: whose steps they are.
        most: steps in a row that are skipped; the next one ends the run. 0: the first one does.

    Attributes:
        total: steps that were skipped so far, over all resumed runs. in_a_row: up to now.
        say: takes a line on every rank; prints it on rank 0 unless replaced.
        before_giving_up: called on all ranks before the run is ended, with the last good weights.

    Raises:
        UsageError: ``most`` is negative.
    """

    def __init__(self, trainer: Trainer, most: int) -> None:
        if most < 0:
            raise UsageError(f"max_bad_steps is {most}: it must be at least 0")
        self._trainer, self._wanted = trainer, most
        self.total, self.in_a_row = 0, 0
        self.say: Callable[[str], None] = self._print
        self.before_giving_up: list[Callable[[], None]] = []
        self._found = "the gradient is not finite"

    @property
    def most(self) -> int:
        """Steps in a row that are skipped: none where a step leaves other state behind."""
        return self._wanted if self._trainer.strategy.traits.atomic_step else 0

    @property
    def counters(self) -> list[int]:
        """What is counted, to be kept beside the step."""
        return [self.total, self.in_a_row]

    @counters.setter
    def counters(self, counted: Sequence[int]) -> None:
        self.total, self.in_a_row = counted

    def note(self, norm: float, totals: Totals, batches: Sequence[MicroBatch]) -> None:
        """A step was skipped, in which nobody has other weights than the others; a collective.

        Args:
            norm: of the gradient, not finite.
            totals: of the step, of all ranks.
            batches: of this rank.

        Raises:
            NumericError: on every rank: weights are not finite, so that no later step could be.
        """
        trainer, counts = self._trainer, totals.sum()
        told = trainer.mesh.all.allgather_obj([self._first(batches), self._first_weight()])
        loss = counts[LOSS] / max(counts[TOKENS], 1.0)
        self._found = (
            f"the gradient is not finite (norm {norm}, mean loss {loss:.4g}): "
            f"{_where([one for one, _ in told], trainer.passes.by_rank)}"
        )
        if without := totals.not_finite():
            many = "es" * (len(without) > 1)
            self._found += f"; without a finite loss: micro-batch{many} {', '.join(map(str, without))}"
        spoiled = [weight for _, weight in told]
        if any(spoiled):
            raise NumericError(
                f"in step {trainer.step + 1} {self._found}. Nor are weights finite "
                f"({_where(spoiled, True)}), so no later step could be. {ADVICE}"
            )
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if self.in_a_row <= self.most:
            self.say(f"step {trainer.step + 1} was skipped ({self._counted()}): {self._found}")

    def check(self) -> None:
        """End the run where too many steps in a row were skipped; outside of what may be begun again.

        Raises:
            NumericError: on every rank.
        """
        if self.in_a_row <= self.most:
            return
        counted, self.in_a_row = self._counted(), 0
        for save in self.before_giving_up:
            save()
        raise NumericError(
            f"in step {self._trainer.step} {self._found}, and no weight has changed ({counted}). {ADVICE}"
        )

    def _counted(self) -> str:
        return f"{self.in_a_row} in a row, and --max-bad-steps is {self.most}"

    def _first(self, batches: Sequence[MicroBatch]) -> str:
        """The first tensor of this rank's gradients that is not finite, made once more; or nothing."""
        trainer = self._trainer
        parts = trainer.passes.again(trainer.step, batches, Totals(trainer.micro_batches))
        shard = None if trainer.passes.by_rank else trainer.replica.own_shard
        return first_not_finite(parts, trainer.replica, shard.start if shard else 0)

    def _first_weight(self) -> str:
        """The first weight of which this rank holds what is not finite, or nothing; a collective."""
        for entry in self._trainer.whole().weights:
            if not all(np.isfinite(piece.read()).all() for piece in entry.pieces):
                return entry.name.split("/", 2)[2]
        return ""

    def _print(self, text: str) -> None:
        if self._trainer.comm.rank == 0:
            output.say(text)


def first_not_finite(parts: Iterable[np.ndarray], replica: Any, start: int = 0) -> str:
    """The path of the variable in which a flat gradient is not finite first; nothing if all are.

    Args:
        parts: gradients, (S,) each.
        replica: knows variables and their layout.
        start: place of their first element in the layout.
    """
    first = ""
    for number, part in enumerate(parts):  # to the end: others may be waiting for this rank's part in it
        if number == 0:
            faults.spoil([part])
        if not first and (places := np.flatnonzero(~np.isfinite(part))).size:
            place = int(np.searchsorted(replica.layout.starts, places[0] + start, "right")) - 1
            first = str(replica.variables[place].path)
    return first


def _where(found: Sequence[str], by_rank: bool) -> str:
    """What ranks have found, each a path or nothing."""
    if not any(found):
        return "made once more, every rank's part is: a fault has passed, or only the sum is too large"
    if not by_rank:
        return f"first in {next(filter(None, found))}"
    ranks: dict[str, list[int]] = {}
    for rank, path in enumerate(found):
        if path:
            ranks.setdefault(path, []).append(rank)
    return "; ".join(f"on {named(those)}, first in {path}" for path, those in ranks.items())
