"""Why a step of the user is refused before it is taken, and what to write instead."""

from __future__ import annotations

from typing import Any

import numpy as np


def of_state(model: Any, path: str) -> str:
    """A step changes a weight by what it sees of its own rows."""
    return (
        f"a training step of {type(model).__name__} changes {path} by itself, and from the rows of a rank it "
        "becomes something else than from those of all: counts, running statistics and queues of examples "
        "are each rank's own. keras.layers.BatchNormalization and keras.metrics are of all rows; what "
        "depends on weights alone is alike on all ranks. docs/sharp-bits.md says what is refused and why"
    )


def of_clipping(model: Any) -> str:
    """A step clips each rank's own gradients."""
    return (
        f"{type(model).__name__}.train_step clips gradients, or changes them in another way that is not "
        "linear, between tape.gradient and the optimizer: each rank would do so to those of its own rows. "
        "Let the optimizer clip, which sees the mean of all ranks: clipnorm=, global_clipnorm= or clipvalue= "
        "of every keras.optimizers optimizer. docs/sharp-bits.md says what is refused and why"
    )


def of_objective(model: Any, closest: float, failures: list[str]) -> str:
    """By no law the gradients are those of one process."""
    apart = f"gradients differ by {closest:.0%} at least" if np.isfinite(closest) else "its steps fail"
    if failures:
        apart += f"; with the rows of all ranks: {failures[0]}"
    return (
        f"the objective that {type(model).__name__} computes in a training step is not that of one process "
        f"with the global batch, whichever way the ranks add theirs up ({apart}): each rank would divide by "
        "its own rows, or compare only its own rows with each other. Use a loss that gives one value for "
        "each row, a keras.losses.Loss with reduction='sum_over_batch_size' or None, or means over rows "
        "throughout; a loss between rows needs them as its arguments (y_true, y_pred). docs/sharp-bits.md "
        "says what is refused and why"
    )
