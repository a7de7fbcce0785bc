"""Strategy wrapper that compresses sums of gradients, or of outer gradients, with a `Compressor`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import NumericError, UsageError
from tf_dist.parallel.compress import Compressor
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.totals import ADVICE, TOKENS, GradientReplica, clipping, own_sum, scale_of
from tf_dist.strategies.allreduce import AllReduce
from tf_dist.strategies.base import Context, Report, Setting, StateArray, StepRequest, Strategy, option
from tf_dist.strategies.compressed_sum import CompressedSum, CompressionTimes, tried
from tf_dist.strategies.local_sgd import LocalSGD

COMPRESSES = "sums of strategies allreduce, local-sgd and diloco over ranks along data"


class MomentumStep(Protocol):
    """An optimizer that steps by a momentum which ranks compute together."""

    beta: float

    def read(self, out: np.ndarray) -> None:
        """Copy the momentum, (P,), of the last step."""

    def apply(self, momentum: np.ndarray) -> None:
        """Set the momentum, (P,), and step by it."""


@dataclass(frozen=True)
class CompressedOptions:
    """When compression begins. start: number of first steps with uncompressed sums."""

    start: int = option(
        0, "compression", "first steps without compression", least=0, flag="compression_start"
    )


class Compressed(Strategy):
    """Compresses the sums of another strategy, with error feedback.

    These are the gradients of `AllReduce`, and the outer gradients of `LocalSGD` and `DiLoCo`. The first
    steps may be uncompressed: gradients are large, and soon change direction.

    With `OneBit` around `AllReduce` it is 1-bit Adam (Tang et al. 2021): after the first steps the variance
    is frozen, and the momentum is all-reduced. Each rank contributes beta m / R + (1 - beta) g_r. Adam's step
    is not linear in gradients, so that error feedback on them would fail; with a frozen variance it is linear
    in the momentum. The outer optimizer is linear in outer gradients, whose signs are summed as they are.
    Clipping is by the sum of the norms of all ranks' gradients, which is at least the norm of their sum.

    Args:
        inner: the strategy.
        compressor: of this rank.
        start: steps before compression begins.

    Raises:
        UsageError: the inner strategy has no sums that could be compressed.
    """

    Options = CompressedOptions

    def __init__(
        self, inner: Strategy, compressor: Compressor, options: CompressedOptions | None = None, **given: Any
    ) -> None:
        self.inner, self.compressor = inner, compressor
        super().__init__(options, **given)
        self.start: int = self.options.start
        self._sum, self._said, self._step = CompressedSum(compressor), "", 0
        self._momentum_step: MomentumStep | None = None
        self._outer = isinstance(inner, LocalSGD)
        if isinstance(inner, LocalSGD):
            self._check_outer(inner)
            inner.outer_sum = self._outer_sum
        elif not isinstance(inner, AllReduce):
            raise UsageError(
                f"compression {compressor} with strategy {inner}: only {COMPRESSES} are compressed. Use "
                "compression none, or one of these strategies"
            )
        self._freezes = compressor.of_momentum and not self._outer
        self.traits = replace(
            inner.traits,
            sums_gradients=inner.traits.sums_gradients if self._outer else self.start > 0,
            atomic_step=False,
            survives_failures=False,
            overlaps=False,
        )
        if self._freezes and self.start < 1:
            raise UsageError(
                f"compression {compressor} with compression_start {self.start}: it needs the variance that "
                "adam or adamw has found in some hundred steps before it is frozen. Use compression_start 200"
            )

    def _check_outer(self, inner: LocalSGD) -> None:
        """A compressor knows the shapes of all weights, and has one residual for them."""
        for name, usual in (("outer_fragments", 1), ("outer_delay", 0), ("outer_precision", "float32")):
            if getattr(inner.plan, name) != usual:
                raise UsageError(
                    f"compression {self.compressor} with {name} {getattr(inner.plan, name)}: outer gradients "
                    "are compressed as a whole, when ranks synchronize. "
                    f"Use {name} {usual}, or compression none"
                )

    @property
    def spent(self) -> CompressionTimes:
        """Cost of compressed sums."""
        return self._sum.spent

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
                f"compression {self.compressor} with {setting.degrees}: only {COMPRESSES} are compressed. "
                "Use degrees of 1, or compression none"
            )
        if self._freezes and setting.optimizer not in ("", "adam", "adamw"):
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
        """As in `Strategy`; also warns if compressed sums are slower than plain ones."""
        super().setup(context)
        self.inner.setup(context)
        comm, said = context.mesh.all, f"compressed by {self.compressor}"
        self.compressor.setup(context.replica.layout.shapes, comm)
        self.compressor.check_smaller()
        self._freeze = context.frozen_adam() if self._freezes else None
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
        return ", ".join(filter(None, (self.inner.describe(), self._said)))

    @property
    def weight_copies(self) -> int:
        """As in `Strategy`; also the residual."""
        return self.inner.weight_copies + 1

    # Steps ----------------------------------------------------------------------------------------

    def step(self, request: StepRequest) -> float:
        """All-reduce compressed gradients, or take the inner strategy's step with compressed outer gradients.

        The norm of an all-reduced gradient, which is clipped, is that of the compressed sum.
        """
        self._step = request.step
        if self._outer or request.step < self.start:
            return self.inner.step(request)
        terms, replica, mesh = request.gradients(), request.replica, request.mesh
        mesh.all.barrier()
        counts = request.totals.reduce(mesh.all)
        gradient = own_sum(terms, replica.parameters)
        gradient *= np.float32(1.0 / max(counts[TOKENS], 1.0))
        norm = self._sum.norms(gradient, mesh.all)
        scale_of(norm, counts, 0.0)  # not finite: all stop, before it enters a residual
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

    def _outer_sum(self, change: np.ndarray, comm: Comm) -> np.ndarray:
        """The sum of outer gradients of all replicas, in place of `LocalSGD.plain_sum`; a collective.

        Raises:
            NumericError: on every rank: one is not finite, and no weight was synchronized.
        """
        if self._step < self.start:
            return LocalSGD.plain_sum(change, comm)
        norm = self._sum.norms(change, comm)
        if not np.isfinite(norm):
            raise NumericError(f"weights have changed by what is not finite (norm {norm}). {ADVICE}")
        return self._sum(change, comm)

    @property
    def in_sync(self) -> bool:
        """As in `Strategy`."""
        return self.inner.in_sync

    def settle(self, replica: GradientReplica) -> None:
        """As in `Strategy`."""
        self.inner.settle(replica)

    def synchronize(self, replica: GradientReplica, mesh: Mesh) -> None:
        """As in `Strategy`."""
        self.inner.synchronize(replica, mesh)

    def regroup(self, micro_batches: range) -> None:
        """As in `Strategy`."""
        super().regroup(micro_batches)
        self.inner.regroup(micro_batches)

    # State ----------------------------------------------------------------------------------------

    def consolidate(self) -> None:
        """As in `Strategy`: sum the residuals of all ranks on rank 0."""
        self.inner.consolidate()
        self._sum.fold(self.context.mesh.all)

    def state(self) -> list[StateArray]:
        """As in `Strategy`: that of the inner strategy, then per-rank arrays, then replicated ones."""
        return [*self.inner.state(), *self._sum.state()]

    def report(self) -> Report | None:
        """As in `Strategy`."""
        return self._sum.report() or self.inner.report()
