"""Updates: gradients of my micro-batches in, the same new weights on every rank out.

This is where the ranks talk. One step of synchronous data-parallel gradient descent is

    w  <-  optimizer(w, g),    g = (1 / n) * sum over ranks r of g_r

where g_r is the gradient of the *sum* of the losses of rank r's tokens, and n the number of tokens of
all ranks. Sums are divided once, at the end: a mean of means would weigh short batches too much.

A new algorithm is a new function of this signature; it touches neither the trainer nor the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.errors import NumericError
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.tree import TreeSum

# What `totals` holds, summed over this rank's micro-batches, then over all ranks.
LOSS, TOKENS, CORRECT, STOP = range(4)


class Replica(Protocol):
    """A copy of the model and its optimizer, as flat float32 arrays of P parameters."""

    parameters: int

    def norm(self, gradient: np.ndarray) -> float:
        """The Euclidean norm of a flat gradient."""

    def apply(self, gradient: np.ndarray, scale: float) -> None:
        """Take one optimizer step with ``scale * gradient``."""

    def skip(self) -> None:
        """Count a step that was taken elsewhere."""

    def read_weights(self, out: np.ndarray) -> None:
        """Copy the weights to ``out``."""

    def write_weights(self, weights: np.ndarray) -> None:
        """Take over these weights."""


Update = Callable[[np.ndarray, np.ndarray, float, Replica, Comm], float]


def allreduce(
    gradient: np.ndarray, totals: np.ndarray, clip_norm: float, replica: Replica, comm: Comm
) -> float:
    """Sum the gradients everywhere; every rank takes the same optimizer step.

    Args:
        gradient: (P,) float32, of the summed loss of this rank's tokens; changed in place.
        totals: (4,) float64, see `LOSS`, `TOKENS`, `CORRECT`, `STOP`; summed over ranks in place.
        clip_norm: largest global norm of the mean gradient; 0 for no clipping.
        replica: this rank's model and optimizer.
        comm: all ranks.

    Returns:
        The global norm of the mean gradient before clipping.

    Raises:
        NumericError: the gradient is not finite; no weight has changed.
    """
    comm.barrier()  # waiting for slower ranks is counted apart from moving bytes
    comm.allreduce(totals)
    comm.allreduce(gradient)
    norm = float(replica.norm(gradient) / max(totals[TOKENS], 1.0))
    replica.apply(gradient, _scale(norm, totals, clip_norm))
    return norm


def master(gradient: np.ndarray, totals: np.ndarray, clip_norm: float, replica: Replica, comm: Comm) -> float:
    """Gather the gradients on rank 0, which alone takes the optimizer step and sends the weights.

    The parameter server of Li et al. (2014), in its synchronous form. Rank 0 holds R gradients and
    moves R times the bytes of any other: see ``docs/guide.md`` for what that costs. Arguments,
    result and errors are those of `allreduce`.
    """
    comm.barrier()
    comm.allreduce(totals)
    rows_RxP = comm.gather(gradient)
    norm = np.zeros(1)
    if rows_RxP is not None:
        gradient = _tree_sum(rows_RxP)
        norm[0] = replica.norm(gradient) / max(totals[TOKENS], 1.0)
    comm.broadcast(norm)
    scale = _scale(float(norm[0]), totals, clip_norm)
    if rows_RxP is not None:
        replica.apply(gradient, scale)
    else:
        replica.skip()
    weights = aligned_empty(replica.parameters)
    if comm.rank == 0:
        replica.read_weights(weights)
    comm.broadcast(weights)
    if comm.rank != 0:
        replica.write_weights(weights)
    return float(norm[0])


UPDATES: dict[str, Update] = {"allreduce": allreduce, "master": master}


def _tree_sum(rows_RxP: np.ndarray) -> np.ndarray:
    tree = TreeSum(rows_RxP.shape[1])
    for row in rows_RxP:
        tree.add(row)
    return tree.result()


def _scale(norm: float, totals: np.ndarray, clip_norm: float) -> float:
    """What turns the summed gradient into the mean gradient, clipped to ``clip_norm``."""
    if not np.isfinite(norm):
        loss = totals[LOSS] / max(totals[TOKENS], 1.0)
        raise NumericError(
            f"the gradient is not finite (norm {norm}, mean loss {loss:.4g}), and no weight has changed. "
            "Try a lower --learning-rate, a longer --warmup-steps or --clip-norm 1"
        )
    clipped = min(1.0, clip_norm / norm) if clip_norm and norm > 0 else 1.0
    return clipped / max(float(totals[TOKENS]), 1.0)
