"""The state in which all ranks were last found equal, kept in memory, from which steps are taken again.

A bit that flips in one replica spoils more than this replica: every gradient made with it has entered sums
that all ranks share. So where ranks are restored (`--on-mismatch restore`), all of them go back to the last
state in which the sentinel found no difference, and take the steps since then once more. A step is a function
of weights, optimizer and its number, so that the weights are, bit for bit, those of a run in which nothing
happened.

It costs a second copy of weights and optimizer, made at each check, and the steps that are taken again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tf_dist.training.pieces import Piece

if TYPE_CHECKING:
    from tf_dist.training.trainer import Trainer


class _Kept(NamedTuple):
    """step: taken then. counters: of tokens and bad steps. arrays: of all that this rank holds."""

    step: int
    counters: list[Any]
    arrays: list[np.ndarray]


class Verified:
    """Keeps what was found equal, and goes back to it.

    Args:
        trainer: whose state it is; its sentinel tells what was found.
        wanted: whether ranks that differ are to be restored.
    """

    def __init__(self, trainer: Trainer, wanted: bool) -> None:
        self._trainer, self._wanted = trainer, wanted
        self._kept: _Kept | None = None
        self._until: int | None = None
        self._inside = False
        sentinel = trainer.sentinel
        sentinel.keep, sentinel.take_again, sentinel.finish = self.keep, self.take_again, self.finish

    @property
    def can(self) -> bool:
        """Whether steps can be taken again: all ranks take each of them together, and have whole models."""
        trainer = self._trainer
        return self._wanted and trainer.mesh.plain and trainer.strategy.traits.atomic_step

    def keep(self, step: int) -> None:
        """All ranks were found equal after so many steps."""
        if not self.can:
            return
        trainer, pieces = self._trainer, self._pieces()
        if self._kept is not None and len(self._kept.arrays) == len(pieces):
            arrays = self._kept.arrays
            for array, piece in zip(arrays, pieces, strict=True):
                np.copyto(array, piece.read())
        else:
            arrays = [np.array(piece.read()) for piece in pieces]
        self._kept = _Kept(step, [trainer.tokens, *trainer.bad.counters], arrays)

    def drop(self) -> None:
        """Forget it: the weights are about to be others, on purpose."""
        self._kept = None

    def take_again(self, step: int) -> str:
        """Go back, and take all steps up to ``step`` once more; a collective.

        Returns:
            What was done, as the end of a sentence; nothing where it cannot be done.

        Raises:
            RankLost: a rank has died; `finish` begins again without it.
        """
        if not self.can or self._kept is None:
            return ""
        first = self._kept.step
        if self._inside:  # another one, while steps are taken again
            self._go_on_from(self._kept, step)
        else:
            self._until = step
            self.finish()
        steps = f"step {step} was" if first + 1 == step else f"steps {first + 1} to {step} were"
        return f", and {steps} taken again" if first < step else ""

    def finish(self) -> None:
        """Take steps again that a death has interrupted; a collective."""
        if self._until is None or self._kept is None or self._inside:
            return
        self._inside = True
        try:
            self._go_on_from(self._kept, self._until)
            self._until = None
        finally:
            self._inside = False

    def _go_on_from(self, kept: _Kept, until: int) -> None:
        trainer = self._trainer
        for array, piece in zip(kept.arrays, self._pieces(), strict=True):
            piece.write(array)
        trainer.step = kept.step
        tokens, *trainer.bad.counters = kept.counters
        trainer.resume_counting(tokens)
        while trainer.step < until:
            trainer.take_once_more()

    def _pieces(self) -> list[Piece]:
        return [piece for entry in self._trainer.whole().entries for piece in entry.pieces]
