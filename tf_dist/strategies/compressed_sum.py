"""Sums over ranks by a `Compressor`, with what they cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.parallel.compress import Compressor
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.reduction_tree import one_each
from tf_dist.strategies.base import Report, StateArray

# Sums of each kind that are timed before the first step, after a warm-up.
TIMED = 3
# Sums between two measurements of the residual, each of which takes two passes over all weights.
MEASURED_EVERY = 20


@dataclass
class CompressionTimes:
    """Cost of compressed sums so far: their number, seconds, bytes, and a recent relative error.

    error: the norm of the residual relative to that of the term plus the previous residual; of this rank.
    """

    sums: int = 0
    seconds: float = 0.0
    bytes: int = 0
    error: float = 0.0


class CompressedSum:
    """Sums terms of all ranks in a smaller form; keeps what was not sent for the next sum.

    Args:
        compressor: of this rank, already set up.

    Attributes:
        spent: cost so far.
    """

    def __init__(self, compressor: Compressor) -> None:
        self.compressor, self.spent = compressor, CompressionTimes()
        self._folded = True

    def norms(self, term: np.ndarray, comm: Comm) -> float:
        """The sum of the norms of all ranks' terms; not finite if a term is not. A collective."""
        norm = np.array([norm_of(term)])
        comm.allreduce(norm)
        return float(norm[0])

    def __call__(self, term: np.ndarray, comm: Comm) -> np.ndarray:
        """The sum of the terms, finite, (P,) float32 each, in place of this rank's; a collective."""
        self._folded = False
        measured = self.spent.sums % MEASURED_EVERY == 0
        wanted = norm_of(term + self.compressor.residual) if measured else 0.0
        begun, before = time.monotonic(), comm.sent_bytes
        total = self.compressor.aggregate(term, comm, term)
        self.spent.seconds += time.monotonic() - begun
        self.spent.bytes += comm.sent_bytes - before
        self.spent.sums += 1
        if wanted:
            self.spent.error = norm_of(self.compressor.residual) / wanted
        return total

    def fold(self, comm: Comm) -> None:
        """Sum the residuals of all ranks on rank 0, for a checkpoint; a collective."""
        if self._folded:
            return
        for array in self.compressor.local_state().values():
            term = array.copy()
            total = comm.allreduce_terms([term], one_each(comm.size), term).array
            np.copyto(array, total if comm.rank == 0 else 0.0)
        self._folded = True

    def state(self) -> list[StateArray]:
        """Per-rank arrays, then replicated ones."""
        own, common = self.compressor.local_state(), self.compressor.replicated_state()
        found = [StateArray(name, array, alike=False) for name, array in own.items()]
        return found + [StateArray(name, array, per_weight=False) for name, array in common.items()]

    def report(self) -> Report | None:
        """Time, bytes and residual so far; None before the first sum."""
        spent = self.spent
        if not spent.sums:
            return None
        plain = 4 * self.compressor.residual.size
        text = (
            f"{1e3 * spent.seconds / spent.sums:.1f} ms and {spent.bytes / spent.sums / 1e6:.2f} MB a sum "
            f"for gradients of {plain / 1e6:.2f} MB; {100 * spent.error:.0f} % of a recent one stayed behind"
        )
        return Report("compression", text)


def tried(compressor: Compressor, comm: Comm) -> dict[str, float]:
    """Time plain and compressed sums of random gradients; a collective. Restores the compressor.

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
                compressor.aggregate(term, comm, term)
            times.append(1e3 * (time.monotonic() - begun))
        found[name] = max(comm.allgather_obj(median(times[1:])))
    for name, array in _state(compressor).items():
        np.copyto(array, kept[name])
    return found


def _state(compressor: Compressor) -> dict[str, np.ndarray]:
    return compressor.local_state() | compressor.replicated_state()


def norm_of(array: np.ndarray) -> float:
    """The norm of a vector that may not be finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(np.dot(array, array)))
