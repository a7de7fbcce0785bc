"""Downpour: workers push gradients to a master and pull weights, each when it is ready.

Rank 0 is the master. It deals out *units* of a global batch (`tf_dist.parallel.dealing`), applies each
gradient as it comes, and answers with new weights and the next unit (Dean et al. 2012). Nobody waits for the
slowest, but for the bound of `--staleness S`. With S = 0 the gradients of a batch are collected, added in the
order of the tree and applied as one: that is `--update allreduce`, bit for bit, with the work shared out as
ranks are ready.

Of every rank a step of the Trainer is a global batch: it ends where the master has told the rank that the
batch is done, with its losses. So all ranks log the same numbers, each as soon as it hears of them.

    worker                                    master
    ready, or (unit, gradient, losses)  --->  apply, or collect; is a batch done?
    (unit, weights), done, losses       <---  as soon as a unit may be begun, or the worker's batch is done

Legend: P parameters, S staleness, n micro-batches of a unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.updates import Totals
from tf_dist.training.master import Master
from tf_dist.training.replica import Replica
from tf_dist.training.units import Asynchrony, Batches, Load, Units
from tf_dist.training.worker import Worker


class Downpour(Units):
    """The update of a rank, master or worker.

    Args:
        replica: of this rank; the master's optimizer is the one that counts.
        mesh: all ranks, along data alone.
        micro_batches: of a global batch.
        size: n, micro-batches of a unit.
        options: how it is done.

    Attributes:
        step: global batches done so far, to be set before each.
        together: whether all ranks hold the master's weights.
        load: of the master.
    """

    def __init__(
        self, replica: Replica, mesh: Mesh, micro_batches: int, size: int, options: Asynchrony
    ) -> None:
        super().__init__(replica, mesh.all, micro_batches, size, options)
        self.step, self.together = 0, True
        self._part: Master | Worker = Master(self) if mesh.all.rank == 0 else Worker(self)
        self.load = self._part.load if isinstance(self._part, Master) else Load()

    @property
    def said(self) -> str:
        """A line for people."""
        bound, unit = self.options.staleness, f"{self.size} micro-batch{'es' * (self.size > 1)}"
        lead = f"at most {bound} global batch{'es' * (bound > 1)} ahead" if bound else "one batch at a time"
        return f"a master deals out units of {unit}, {lead}"

    @property
    def cost(self) -> str:
        """What the master has done so far, for a person."""
        report = self.load.report()
        mean = sum(stale * count for stale, count in self.load.staleness.items()) / max(1, self.load.updates)
        return (
            f"{report['updates_per_s']:.1f} updates/s, busy {100 * report['master_load']:.0f} % of the time, "
            f"gradients {mean:.1f} updates old on average"
        )

    def take(self, batches: Batches, totals: Totals, clip_norm: float, limit: int) -> float:
        """Do this rank's part of a global batch.

        Args:
            batches: makes the micro-batches of a step that are asked for, by number.
            totals: takes the sums of the whole batch, on every rank, and knows whether this one wants to
                stop.
            clip_norm: largest norm of the mean gradient that is applied at once; 0 for no clipping.
            limit: the step before which all ranks will meet: nothing of it is begun.

        Returns:
            The norm of the mean gradient, over several the mean of their norms, weighed by tokens.

        Raises:
            NumericError: on the master: a gradient is not finite, and has not been applied.
            LaunchError: on the master: a worker is not heard of.
        """
        self.together = False
        result = self._part.take(self.step, batches, totals.stop_wanted, clip_norm, max(limit, self.step + 1))
        totals.set(result.counts)
        self.step += 1
        return result.norm

    def meet(self, replica: Any, mesh: Mesh) -> None:
        """Give all ranks the master's weights; a collective."""
        if not self.together:
            self.replica.give_weights(mesh.all)
            self.together = True
            if isinstance(self._part, Master):
                self._part.renew()

    def settle(self, replica: Any) -> None:
        """Before a meeting nothing is under way: `take` has waited for it."""

    def regroup(self, micro_batches: range) -> None:
        """Go on without ranks that have died; all meet again. No micro-batch is a rank's own."""
        self.together = False
        if isinstance(self._part, Master):
            self._part.regroup()

    def set_rates(self, rate: Callable[[int, float], None]) -> None:
        """Let the master call ``rate(step, factor)`` before each of its optimizer's steps."""
        if isinstance(self._part, Master):
            self._part.rate = rate
