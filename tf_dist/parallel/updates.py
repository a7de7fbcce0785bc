"""Updates: gradients of my micro-batches in, the same new weights on every rank out.

This is where the ranks talk. One step of synchronous data-parallel gradient descent is

    w  <-  optimizer(w, g),    g = (1 / n) * sum over micro-batches m of g_m

where g_m is the gradient of the *sum* of the losses of its tokens, and n the number of tokens of
all of them. Sums are divided once, at the end: a mean of means would weigh short batches too much. And they
are added in one order, whoever computed them (`tree`), so the number of ranks never changes the weights.

A new algorithm is a new function of this signature; it touches neither the trainer nor the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from tf_dist import faults
from tf_dist.comm.base import Comm
from tf_dist.comm.sums import Order
from tf_dist.errors import NumericError, RankLost
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.mesh import Mesh

# The columns of `Totals`: of each micro-batch, the summed loss, the number of targets and of right guesses;
# and whether a rank wants to stop.
LOSS, TOKENS, CORRECT, STOP = range(4)
# What helps against numbers that are none.
ADVICE = "Try a lower --learning-rate, a longer --warmup-steps or --clip-norm 1"


class Totals:
    """Sums over the M micro-batches of a step, in an order that does not depend on ranks.

    Every micro-batch has a row of its own, which one rank fills and the others leave at zero. Adding zeros is
    exact, so the reduction over ranks is as well, in whatever order it adds; the rows are then summed alike
    everywhere.

    Args:
        micro_batches: M.
    """

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self._rows = np.zeros((micro_batches + 1, 4))

    def add(self, micro_batch: int, sums: np.ndarray) -> None:
        """Note the loss, targets and right guesses, (3,), of one micro-batch."""
        self._rows[micro_batch, :STOP] += sums

    def ask_to_stop(self) -> None:
        """Note that this rank wants to stop after the step."""
        self._rows[-1, STOP] = 1.0

    @property
    def stop_wanted(self) -> bool:
        """Whether this rank wants to stop."""
        return bool(self._rows[-1, STOP])

    def set(self, counts: np.ndarray) -> None:
        """Take over the totals, (4,), that somebody else has added."""
        self._rows[:], self._rows[-1] = 0.0, counts

    def reduce(self, comm: Comm) -> np.ndarray:
        """Sum over all ranks, in place; the totals, (4,). A collective."""
        comm.allreduce(self._rows.reshape(-1))
        return self.sum()

    def of(self, micro_batches: range) -> np.ndarray:
        """The totals of some neighbouring micro-batches, (4,)."""
        return np.asarray(self._rows[micro_batches.start : micro_batches.stop].sum(axis=0))

    def not_finite(self) -> list[int]:
        """The micro-batches whose loss is not finite."""
        return np.flatnonzero(~np.isfinite(self._rows[:-1, LOSS])).tolist()

    def sum(self) -> np.ndarray:
        """The totals so far, (4,)."""
        return np.asarray(self._rows.sum(axis=0))


class Replica(Protocol):
    """What a rank has of the model and its optimizer, as flat float32 arrays of P parameters."""

    parameters: int

    def norm(self, gradient: np.ndarray, squares: np.ndarray | None = None) -> float:
        """The norm of the whole gradient; a collective of `Mesh.model`, whose ranks have parts of it."""

    def complete(self, gradient: np.ndarray) -> np.ndarray:
        """Add what other ranks of `Mesh.model` have for the same weights, where there are such.

        The gradient may lie in memory that ranks share: it is never written to.
        """

    def apply(self, gradient: np.ndarray, scale: float) -> None:
        """Take one optimizer step with ``scale * gradient``."""

    def skip(self) -> None:
        """Count a step that was taken elsewhere."""

    def read_weights(self, out: np.ndarray) -> None:
        """Copy the weights to ``out``."""

    def write_weights(self, weights: np.ndarray) -> None:
        """Take over these weights."""


Update = Callable[[list[np.ndarray], Order, Totals, float, Replica, Mesh], float]


def allreduce(
    terms: list[np.ndarray], order: Order, totals: Totals, clip_norm: float, replica: Replica, mesh: Mesh
) -> float:
    """Sum the gradients everywhere; every rank takes the same optimizer step.

    Args:
        terms: sums of the gradients of this rank's micro-batches, (P,) float32 each; they are used up.
        order: in which the terms of all replicas are added.
        totals: of this rank; summed over ranks in place.
        clip_norm: largest global norm of the mean gradient; 0 for no clipping.
        replica: what this rank has of model and optimizer.
        mesh: all ranks; gradients are summed over `Mesh.replicas`.

    Returns:
        The global norm of the mean gradient before clipping.

        Where it is not finite, on every rank the same, nobody has stepped.
    """
    mesh.all.barrier()  # waiting for slower ranks is counted apart from moving bytes
    counts = totals.reduce(mesh.all)
    faults.at("allreduce")
    found = mesh.replicas.allreduce_terms(terms, order, _sum_buffer(terms, replica))
    gradient = replica.complete(found.array)
    # Rank 0's norm for all: on a node with another processor it could differ in its last bit.
    own = replica.norm(gradient, found.squares) / max(counts[TOKENS], 1.0)
    length = np.array([own])
    mesh.all.broadcast(length)
    if mesh.all.survives and not np.isclose(length[0], own, rtol=1e-3, equal_nan=True):
        raise RankLost("a death has cut a broadcast short")
    faults.at("update")
    if np.isfinite(length[0]):
        replica.apply(gradient, scale_of(float(length[0]), counts, clip_norm))
    return float(length[0])


def master(
    terms: list[np.ndarray], order: Order, totals: Totals, clip_norm: float, replica: Replica, mesh: Mesh
) -> float:
    """Gather the gradients on rank 0 of the replicas, which alone steps, and sends the weights.

    The parameter server of Li et al. (2014), in its synchronous form. Rank 0 holds R gradients and
    moves R times the bytes of any other: see ``docs/guide.md`` for what that costs. Arguments and
    result are those of `allreduce`.
    """
    mesh.all.barrier()
    counts = totals.reduce(mesh.all)
    faults.at("allreduce")
    total = mesh.replicas.reduce_terms(terms, order, _sum_buffer(terms, replica))
    length = np.zeros(1)
    if total is not None:
        gradient = replica.complete(total.array)
        length[0] = replica.norm(gradient, total.squares) / max(counts[TOKENS], 1.0)
    mesh.all.broadcast(length)
    faults.at("update")
    if not np.isfinite(length[0]):
        return float(length[0])
    scale = scale_of(float(length[0]), counts, clip_norm)
    weights = aligned_empty(replica.parameters)
    if total is not None:
        replica.apply(gradient, scale)
        replica.read_weights(weights)
    else:
        replica.skip()
    mesh.replicas.broadcast(weights)
    if mesh.replicas.rank != 0:
        replica.write_weights(weights)
    return float(length[0])


UPDATES: dict[str, Update] = {"allreduce": allreduce, "master": master}


def _sum_buffer(terms: list[np.ndarray], replica: Replica) -> np.ndarray:
    """Where the sum goes: over the first term, which is used up, or on a rank without one, new memory."""
    return terms[0] if terms else aligned_empty(replica.parameters)


def own_sum(terms: list[np.ndarray], length: int) -> np.ndarray:
    """The sum of a rank's terms, in the first of them; zeros where there is none."""
    if not terms:
        total = aligned_empty(length)
        total.fill(0.0)
        return total
    for term in terms[1:]:
        terms[0] += term
    return terms[0]


def scale_of(norm: float, counts: np.ndarray, clip_norm: float) -> float:
    """What turns the summed gradient into the mean gradient, clipped to ``clip_norm``.

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
    """What shortens a gradient to ``clip_norm``, where it is longer; 0 is for no clipping."""
    return min(1.0, clip_norm / norm) if clip_norm and norm > 0 else 1.0
