"""The update `allreduce` of compressed gradients: a `Compressor` stands between them and the Comm."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.comm.sums import Order
from tf_dist.parallel.compress import Compressor
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.tree import one_each
from tf_dist.parallel.updates import TOKENS, Replica, Totals, allreduce, clipping, own_sum, scale_of

# Sums of each kind that are timed before the first step, after one that is not.
TIMED = 3
# Sums from one measurement of what stays behind to the next: it takes two passes over all weights.
MEASURED_EVERY = 20


@dataclass
class Spent:
    """What compressed sums have cost so far: their number, seconds, bytes, and a recent one's relative error.

    error: the norm of what stayed behind, as a part of that of the gradient with what had stayed before; of
    this rank.
    """

    sums: int = 0
    seconds: float = 0.0
    bytes: int = 0
    error: float = 0.0


class Compressed:
    """An `Update` with a memory: what was not sent yet.

    Args:
        compressor: of this rank.
        start_step: the first steps sum gradients whole: they are large, and point to where they soon do not.

    Attributes:
        step: optimizer steps taken so far; to be set where a run goes on.
        spent: on compressed sums.
        together: all ranks always hold the same weights.
    """

    together = True

    def __init__(self, compressor: Compressor, start_step: int = 0) -> None:
        self.compressor, self.start_step = compressor, start_step
        self.step, self.spent = 0, Spent()
        self._folded = True

    def __call__(
        self,
        terms: list[np.ndarray],
        order: Order,
        totals: Totals,
        clip_norm: float,
        replica: Replica,
        mesh: Mesh,
    ) -> float:
        """Sum what all ranks send of their gradients; every rank takes the same optimizer step.

        Arguments, result and errors are those of `tf_dist.parallel.updates.allreduce`; the norm, which is
        clipped, is that of the sum of what was sent.
        """
        self.step += 1
        if self.step <= self.start_step:
            return allreduce(terms, order, totals, clip_norm, replica, mesh)
        mesh.all.barrier()
        counts = totals.reduce(mesh.all)
        gradient = own_sum(terms, replica.parameters)
        gradient *= np.float32(1.0 / max(counts[TOKENS], 1.0))
        self._folded = False
        return self._step(gradient, counts, clip_norm, replica, mesh)

    def _step(
        self, gradient: np.ndarray, counts: np.ndarray, clip_norm: float, replica: Replica, mesh: Mesh
    ) -> float:
        """Sum and step; the norm."""
        self._check_finite(gradient, counts, mesh.all)
        total = self._sum(gradient, mesh.all)
        length = np.array([replica.norm(total)])
        mesh.all.broadcast(length)
        norm = float(length[0])
        replica.apply(total, clipping(norm, clip_norm))
        return norm

    def _sum(self, gradient: np.ndarray, comm: Comm) -> np.ndarray:
        measured = self.spent.sums % MEASURED_EVERY == 0
        wanted = _norm(gradient + self.compressor.residual) if measured else 0.0
        begun, before = time.monotonic(), comm.sent_bytes
        total = self.compressor.sum(gradient, comm)
        self.spent.seconds += time.monotonic() - begun
        self.spent.bytes += comm.sent_bytes - before
        self.spent.sums += 1
        if wanted:
            self.spent.error = _norm(self.compressor.residual) / wanted
        return total

    def _check_finite(self, gradient: np.ndarray, counts: np.ndarray, comm: Comm) -> float:
        """Stop all ranks before what is not a number has come into a residual; the sum of their norms."""
        norm = np.array([_norm(gradient)])
        comm.allreduce(norm)
        scale_of(float(norm[0]), counts, 0.0)
        return float(norm[0])

    def fold(self, comm: Comm) -> None:
        """Give rank 0 what all ranks have not sent yet; a collective.

        A checkpoint knows no ranks. So that a run that goes on from it and one that was never stopped are the
        same, both go on from here.
        """
        if not self._folded:
            for array in self.compressor.own_arrays().values():
                term = array.copy()
                total = comm.allreduce_terms([term], one_each(comm.size), term).array
                np.copyto(array, total if comm.rank == 0 else 0.0)
            self._folded = True

    def meet(self, replica: Replica, mesh: Mesh) -> None:
        """Nothing: all ranks hold the same weights."""

    @property
    def first_whole(self) -> bool:
        """Whether gradients of the first steps are summed as they are."""
        return self.start_step > 0

    @property
    def cost(self) -> str:
        """What it has cost so far, for a person; nothing where there were no sums."""
        spent = self.spent
        if not spent.sums:
            return ""
        plain = 4 * self.compressor.residual.size
        return (
            f"{1e3 * spent.seconds / spent.sums:.1f} ms and {spent.bytes / spent.sums / 1e6:.2f} MB a step "
            f"for gradients of {plain / 1e6:.2f} MB; {100 * spent.error:.0f} % of a recent one stayed behind"
        )


class MomentumStep(Protocol):
    """An optimizer that steps by a momentum which ranks make together."""

    beta: float

    def read(self, out: np.ndarray) -> None:
        """Copy the momentum, (P,), of the last step."""

    def apply(self, momentum: np.ndarray) -> None:
        """Take over a momentum, (P,), and step by it."""


class CompressedMomentum(Compressed):
    """1-bit Adam (Tang et al. 2021): after the first steps the variance is frozen, and the momentum travels.

    Each rank gives its part of the new momentum, beta m / R + (1 - beta) g_r. Adam's step is not linear in
    gradients, so that what was not sent of them could not be made up for; with a frozen variance it is linear
    in the momentum.

    Clipping is by the sum of the norms of all ranks' gradients, which is at least the norm of their sum.

    Args:
        compressor: of this rank.
        start_step: steps of plain Adam before, at least one.
        optimizer_step: called once the variance is frozen, for the step that uses it.
    """

    def __init__(
        self, compressor: Compressor, start_step: int, optimizer_step: Callable[[], MomentumStep]
    ) -> None:
        super().__init__(compressor, start_step)
        self._make = optimizer_step
        self._momentum_step: MomentumStep | None = None

    def _step(
        self, gradient: np.ndarray, counts: np.ndarray, clip_norm: float, replica: Replica, mesh: Mesh
    ) -> float:
        norm = self._check_finite(gradient, counts, mesh.all)
        if self._momentum_step is None:
            self._momentum_step = self._make()
        beta = self._momentum_step.beta
        momentum = np.empty_like(gradient)
        self._momentum_step.read(momentum)
        momentum *= np.float32(beta / mesh.all.size)
        gradient *= np.float32((1.0 - beta) * clipping(norm, clip_norm))
        momentum += gradient
        self._momentum_step.apply(self._sum(momentum, mesh.all))
        return norm


def tried(compressor: Compressor, comm: Comm) -> dict[str, float]:
    """Time both kinds of sum on made-up gradients; a collective. The compressor is as before after it.

    Returns:
        Medians: plain_ms and compressed_ms, each of the slowest rank.
    """
    size = compressor.residual.size
    made = np.random.default_rng(comm.rank).standard_normal(size, np.float32)
    kept = {name: array.copy() for name, array in _state(compressor).items()}
    found = {}
    for name in ("plain_ms", "compressed_ms"):
        times = []
        for _ in range(1 + TIMED):
            term = aligned_empty(size)
            np.copyto(term, made)
            comm.barrier()
            begun = time.monotonic()
            if name == "plain_ms":
                comm.allreduce_terms([term], one_each(comm.size), term)
            else:
                compressor.sum(term, comm)
            times.append(1e3 * (time.monotonic() - begun))
        found[name] = max(comm.allgather_obj(median(times[1:])))
    for name, array in _state(compressor).items():
        np.copyto(array, kept[name])
    return found


def _state(compressor: Compressor) -> dict[str, np.ndarray]:
    return compressor.own_arrays() | compressor.common_arrays()


def _norm(array: np.ndarray) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(np.dot(array, array)))
