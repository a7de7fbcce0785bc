"""Reduction of losses and counts of a step, and the step size of a summed gradient.

One step of synchronous data-parallel gradient descent is

    w  <-  optimizer(w, g),    g = (1 / n) * sum over micro-batches m of g_m

where g_m is the gradient of the *sum* of the losses of its tokens, and n the number of tokens of
all of them. Sums are divided once, at the end: a mean of means would overweight short batches. And they
are added in one order, whichever ranks computed them (`reduction_tree`), so the number of ranks never changes
the weights.

The strategy decides when ranks communicate in a step (`tf_dist.strategies`).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import NumericError
from tf_dist.parallel.flat_buffer import aligned_empty

# The columns of `Totals`: of each micro-batch, the summed loss, the number of targets and of correct
# predictions; and whether a rank wants to stop.
LOSS, TOKENS, CORRECT, STOP = range(4)
# Advice shown when a gradient is NaN or infinite.
ADVICE = "Try a lower --learning-rate, a longer --warmup-steps or --clip-norm 1"


class Totals:
    """Sums over the M micro-batches of a step, in an order that does not depend on ranks.

    Every micro-batch has its own row, which one rank fills and the others leave at zero. Adding zeros is
    exact, so the reduction over ranks is as well, in any order; every rank then sums the rows in the same
    order.

    Args:
        micro_batches: M.
    """

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self._rows = np.zeros((micro_batches + 1, 4))

    def add(self, micro_batch: int, sums: np.ndarray) -> None:
        """Record the loss, targets and correct predictions, (3,), of one micro-batch."""
        self._rows[micro_batch, :STOP] += sums

    def ask_to_stop(self) -> None:
        """Request a stop after this step, for this rank."""
        self._rows[-1, STOP] = 1.0

    @property
    def stop_wanted(self) -> bool:
        """Whether this rank has requested a stop."""
        return bool(self._rows[-1, STOP])

    def set(self, counts: np.ndarray) -> None:
        """Set the totals, (4,), from sums made elsewhere."""
        self._rows[:], self._rows[-1] = 0.0, counts

    def reduce(self, comm: Comm) -> np.ndarray:
        """Sum over all ranks, in place; returns the totals, (4,). A collective."""
        comm.allreduce(self._rows.reshape(-1))
        return self.sum()

    def of(self, micro_batches: range) -> np.ndarray:
        """The totals of consecutive micro-batches, (4,)."""
        return np.asarray(self._rows[micro_batches.start : micro_batches.stop].sum(axis=0))

    def not_finite(self) -> list[int]:
        """The micro-batches whose loss is not finite."""
        return np.flatnonzero(~np.isfinite(self._rows[:-1, LOSS])).tolist()

    def sum(self) -> np.ndarray:
        """The totals so far, (4,)."""
        return np.asarray(self._rows.sum(axis=0))


class GradientReplica(Protocol):
    """A rank's part of the model and its optimizer, as flat float32 arrays of P parameters."""

    parameters: int

    def norm(self, gradient: np.ndarray, squares: np.ndarray | None = None) -> float:
        """The global norm of the gradient; a collective of `Mesh.model`, whose ranks have shards of it."""

    def complete(self, gradient: np.ndarray) -> np.ndarray:
        """Add the gradients of other ranks of `Mesh.model` for the same weights (tied weights), if any.

        The gradient may be in shared memory: it is never written to.
        """

    def apply(self, gradient: np.ndarray, scale: float) -> None:
        """Take one optimizer step with ``scale * gradient``."""

    def skip(self) -> None:
        """Count a step that was taken elsewhere."""

    def read_weights(self, out: np.ndarray) -> None:
        """Copy the weights to ``out``."""

    def write_weights(self, weights: np.ndarray) -> None:
        """Set the weights."""


def sum_buffer(terms: list[np.ndarray], replica: GradientReplica) -> np.ndarray:
    """Buffer for the sum: the first term, which is overwritten, or on a rank without one, new memory."""
    return terms[0] if terms else aligned_empty(replica.parameters)


def own_sum(terms: list[np.ndarray], length: int) -> np.ndarray:
    """The sum of a rank's terms, in the first of them; zeros if it has none."""
    if not terms:
        total = aligned_empty(length)
        total.fill(0.0)
        return total
    for term in terms[1:]:
        terms[0] += term
    return terms[0]


def scale_of(norm: float, counts: np.ndarray, clip_norm: float) -> float:
    """The factor that turns the summed gradient into the mean gradient, clipped to ``clip_norm``.

    Raises:
        NumericError: the norm is not finite.
    """
    if not np.isfinite(norm):
        loss = counts[LOSS] / max(counts[TOKENS], 1.0)
        raise NumericError(
            f"the gradient is not finite (norm {norm}, mean loss {loss:.4g}), and no weight has changed. "
            f"{ADVICE}"
        )
    return clipping(norm, clip_norm) / max(float(counts[TOKENS]), 1.0)


def clipping(norm: float, clip_norm: float) -> float:
    """The factor that clips a gradient to ``clip_norm``; 0 disables clipping."""
    return min(1.0, clip_norm / norm) if clip_norm and norm > 0 else 1.0
