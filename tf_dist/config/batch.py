"""Options of batches and steps: how many rows, how often, and from which seed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options
from tf_dist.errors import UsageError

option = partial(options.option, group="batch and steps")


@dataclass(frozen=True)
class BatchOptions(options.Options):
    """Batches and steps. Sizes in sequences."""

    global_batch_size: int = option(
        32, text="sequences per optimizer step, over all ranks", least=1, on_resume="same"
    )
    micro_batch_size: int = option(
        0,
        text="sequences per forward and backward pass; must divide the global batch; 0: automatic, see the "
        "banner",
        least=0,
    )
    steps: int = option(0, text="optimizer steps; 0: as many as --epochs takes, or 400", least=0)
    epochs: int = option(0, text="passes over the training data, when steps is 0", least=0)
    seed: int = option(
        1, text="random seed for split, data order, initial weights and dropout", least=0, on_resume="same"
    )

    def check(self) -> None:
        """Refuse batches that cannot be cut evenly, and two lengths of a run."""
        if self.global_batch_size % self.micro_batch_rows:
            fits = [n for n in range(1, self.global_batch_size + 1) if self.global_batch_size % n == 0]
            raise UsageError(
                f"micro_batch_size {self.micro_batch_size} does not divide global_batch_size "
                f"{self.global_batch_size}. Divisors: {', '.join(map(str, fits))}"
            )
        if self.seed >= 1 << 32:
            raise UsageError(f"seed is {self.seed}: Keras and NumPy take seeds below {1 << 32}")
        if self.steps and self.epochs:
            raise UsageError(f"both steps ({self.steps}) and epochs ({self.epochs}) are set: leave one at 0")

    @property
    def micro_batch_rows(self) -> int:
        """Sequences in a micro-batch, chosen when not given."""
        return self.micro_batch_size or default_micro_batch(self.global_batch_size)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one global batch."""
        return self.global_batch_size // self.micro_batch_rows


def default_micro_batch(global_batch_size: int) -> int:
    """The largest divisor of the global batch that still makes at least four micro-batches.

    It may not look at the number of ranks, or results would depend on it.
    """
    largest = max(1, global_batch_size // 4)
    return next(rows for rows in range(largest, 0, -1) if global_batch_size % rows == 0)
