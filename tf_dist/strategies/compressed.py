"""Compressed sums of gradients: a `Compressor` stands between them and the Comm."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Protocol

import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.errors import UsageError
from tf_dist.parallel.compress import Compressor
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.totals import TOKENS, clipping, own_sum, scale_of
from tf_dist.parallel.tree import one_each
from tf_dist.strategies.allreduce import AllReduce
from tf_dist.strategies.base import Context, Report, Setting, StateArray, StepRequest, Strategy, option

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


class MomentumStep(Protocol):
    """An optimizer that steps by a momentum which ranks make together."""

    beta: float

    def read(self, out: np.ndarray) -> None:
        """Copy the momentum, (P,), of the last step."""

    def apply(self, momentum: np.ndarray) -> None:
        """Take over a momentum, (P,), and step by it."""


@dataclass(frozen=True)
class CompressedOptions:
    """When compression begins. start: first steps whose gradients are summed whole."""

    start: int = option(
        0, "compression", "first steps without compression", least=0, flag="compression_start"
    )


class Compressed(Strategy):
    """A strategy whose sums of gradients are compressed; it remembers what was not sent yet.

    The first steps may sum gradients whole: they are large, and point to where they soon do not.

    With `OneBit` it is 1-bit Adam (Tang et al. 2021): after the first steps the variance is frozen, and the
    momentum travels. Each rank gives its part of the new momentum, beta m / R + (1 - beta) g_r. Adam's step
    is not linear in gradients, so that what was not sent of them could not be made up for; with a frozen
    variance it is linear in the momentum. Clipping is by the sum of the norms of all ranks' gradients, which
    is at least the norm of their sum.

    Args:
        inner: the strategy, which must sum gradients everywhere.
        compressor: of this rank.
        start: steps before compression begins.

    Attributes:
        spent: on compressed sums.

    Raises:
        UsageError: the inner strategy sums nothing that could be compressed.
    """

    Options = CompressedOptions

    def __init__(
        self, inner: Strategy, compressor: Compressor, options: CompressedOptions | None = None, **given: Any
    ) -> None:
        self.inner, self.compressor = inner, compressor
        super().__init__(options, **given)
        self.start: int = self.options.start
        if not isinstance(inner, AllReduce):
            raise UsageError(
                f"compression {compressor} with strategy {inner}: only sums of strategy allreduce over ranks "
                "along data are compressed. Use compression none, or strategy allreduce"
            )
        self.traits = replace(
            inner.traits,
            sums_gradients=self.start > 0,
            atomic_step=False,
            finishes_without_dead=False,
            overlaps=False,
        )
        if compressor.of_momentum and self.start < 1:
            raise UsageError(
                f"compression {compressor} with compression_start {self.start}: it needs the variance that "
                "adam or adamw has found in some hundred steps before it is frozen. Use compression_start 200"
            )
        self.spent, self._folded, self._said = Spent(), True, ""
        self._momentum_step: MomentumStep | None = None

    def __str__(self) -> str:
        return str(self.inner)

    def facts(self) -> dict[str, Any]:
        """As in `Configured`."""
        own = {**self.compressor.facts(), **super().facts()}
        named = {f"compression_{name}": value for name, value in own.items()}
        return {**self.inner.facts(), "compression": str(self.compressor), **named}

    def check(self, setting: Setting) -> None:
        """As in `Strategy`."""
        self.inner.check(setting)
        if setting.shared:
            raise UsageError(
                f"compression {self.compressor} with {setting.degrees}: only sums of strategy allreduce over "
                "ranks along data are compressed. Use degrees of 1, or compression none"
            )
        if self.compressor.of_momentum and setting.optimizer not in ("", "adam", "adamw"):
            raise UsageError(
                f"compression {self.compressor} with optimizer {setting.optimizer}: it needs the variance of "
                "adam or adamw. Use optimizer adamw"
            )
        if setting.backend == "horovod" and not self.compressor.by_horovod:
            raise UsageError(
                f"backend horovod cannot carry compression {self.compressor}: use backend mpi, or "
                "compression powersgd"
            )

    def assignment(self, count: int, mesh: Mesh) -> range:
        """As in `Strategy`."""
        return self.inner.assignment(count, mesh)

    def setup(self, context: Context) -> None:
        """Also warn where compressed sums take longer than plain ones."""
        super().setup(context)
        self.inner.setup(context)
        self.compressor.setup(context.replica.layout.shapes)
        self.compressor.check_worth()
        self._freeze = context.frozen_adam() if self.compressor.of_momentum else None
        comm, said = context.mesh.all, f"compressed by {self.compressor}"
        if comm.size > 1 and context.measure:
            took = tried(self.compressor, comm)
            said += f", {took['compressed_ms']:.2f} ms (plain, by messages, {took['plain_ms']:.2f} ms)"
            if took["compressed_ms"] > took["plain_ms"] and comm.rank == 0:
                warnings.warn(
                    f"{said}: it costs more than it saves here. Use --compression none", stacklevel=2
                )
        self._said = said

    def describe(self) -> str:
        """As in `Strategy`."""
        return self._said

    def step(self, request: StepRequest) -> float:
        """Sum what all ranks send of their gradients; every rank takes the same optimizer step.

        The norm, which is clipped, is that of the sum of what was sent.
        """
        if request.step < self.start:
            return self.inner.step(request)
        terms, replica, mesh = request.gradients(), request.replica, request.mesh
        mesh.all.barrier()
        counts = request.totals.reduce(mesh.all)
        gradient = own_sum(terms, replica.parameters)
        gradient *= np.float32(1.0 / max(counts[TOKENS], 1.0))
        self._folded = False
        norm = self._check_finite(gradient, counts, mesh.all)
        if self._freeze:
            self._step_by_momentum(gradient, clipping(norm, request.clip_norm), mesh.all)
            return norm
        total = self._sum(gradient, mesh.all)
        length = np.array([replica.norm(total)])
        mesh.all.broadcast(length)
        norm = float(length[0])
        replica.apply(total, clipping(norm, request.clip_norm))
        return norm

    def _step_by_momentum(self, gradient: np.ndarray, scale: float, comm: Comm) -> None:
        """The step of 1-bit Adam."""
        if self._momentum_step is None:
            assert self._freeze is not None
            self._momentum_step = self._freeze(self.start)
        beta = self._momentum_step.beta
        momentum = np.empty_like(gradient)
        self._momentum_step.read(momentum)
        momentum *= np.float32(beta / comm.size)
        gradient *= np.float32((1.0 - beta) * scale)
        momentum += gradient
        self._momentum_step.apply(self._sum(momentum, comm))

    def regroup(self, micro_batches: range) -> None:
        """As in `Strategy`."""
        super().regroup(micro_batches)
        self.inner.regroup(micro_batches)

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

    def consolidate(self) -> None:
        """As in `Strategy`: give rank 0 what all ranks have not sent yet."""
        self.inner.consolidate()
        comm = self.context.mesh.all
        if not self._folded:
            for array in self.compressor.own_arrays().values():
                term = array.copy()
                total = comm.allreduce_terms([term], one_each(comm.size), term).array
                np.copyto(array, total if comm.rank == 0 else 0.0)
            self._folded = True

    def state(self) -> list[StateArray]:
        """As in `Strategy`: what is each rank's own, then what all have alike."""
        own, common = self.compressor.own_arrays(), self.compressor.common_arrays()
        found = [StateArray(name, array, alike=False) for name, array in own.items()]
        found += [StateArray(name, array, per_weight=False) for name, array in common.items()]
        return [*self.inner.state(), *found]

    def report(self) -> Report | None:
        """As in `Strategy`."""
        spent = self.spent
        if not spent.sums:
            return self.inner.report()
        plain = 4 * self.compressor.residual.size
        text = (
            f"{1e3 * spent.seconds / spent.sums:.1f} ms and {spent.bytes / spent.sums / 1e6:.2f} MB a step "
            f"for gradients of {plain / 1e6:.2f} MB; {100 * spent.error:.0f} % of a recent one stayed behind"
        )
        return Report("compression", text)


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
