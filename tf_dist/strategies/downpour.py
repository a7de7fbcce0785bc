"""Downpour: workers push gradients to a master and pull weights, each when it is ready.

Rank 0 is the master. It deals out *units* of a global batch (`tf_dist.parallel.dealing`), applies each
gradient as it comes, and answers with new weights and the next unit (Dean et al. 2012). Nobody waits for the
slowest, but for the bound of `--staleness S`. With S = 0 the gradients of a batch are collected, added in the
order of the tree and applied as one: that is `--strategy allreduce`, bit for bit, with the work shared out as
ranks are ready.

Of every rank a step of the Trainer is a global batch: it ends where the master has told the rank that the
batch is done, with its losses. So all ranks log the same numbers, each as soon as it hears of them.

    worker                                    master
    ready, or (unit, gradient, losses)  --->  apply, or collect; is a batch done?
    (unit, weights), done, losses       <---  as soon as a unit may be begun, or the worker's batch is done

Legend: P parameters, S staleness, n micro-batches of a unit.
"""

from __future__ import annotations

from typing import Any

from tf_dist.parallel.dealing import micro_batches_of_a_unit
from tf_dist.parallel.mesh import Mesh
from tf_dist.strategies.base import Context, Report, Setting, StepRequest, Strategy, Traits
from tf_dist.strategies.downpour_protocol import DownpourOptions, Load, Units
from tf_dist.strategies.downpour_server import Master
from tf_dist.strategies.downpour_worker import Worker
from tf_dist.strategies.waiting import check_worker


class Downpour(Strategy):
    """Asynchronous SGD with a master; the master's optimizer is the one that counts.

    Attributes:
        units: what this rank computes units with.
        load: of the master.
    """

    name, Options = "downpour", DownpourOptions
    traits = Traits(replicas_equal=False, lockstep=False, sums_gradients=False, optimizer_on_root=True)

    def __init__(self, options: DownpourOptions | None = None, **given: Any) -> None:
        super().__init__(options, **given)
        self._done, self._together = 0, True
        self.load = Load()

    def check(self, setting: Setting) -> None:
        """As in `Strategy`."""
        check_worker(self, setting)

    def assignment(self, count: int, mesh: Mesh) -> range:
        """None: the master deals them out."""
        return range(0)

    def setup(self, context: Context) -> None:
        """As in `Strategy`."""
        super().setup(context)
        comm = context.mesh.all
        workers = max(1, comm.size - (self.options.master_trains == "off"))
        size = micro_batches_of_a_unit(context.count, workers)
        self.units = Units(context.replica, comm, context.count, size, self.options)
        self._master = Master(self.units) if comm.rank == 0 else None
        self._part: Master | Worker = self._master or Worker(self.units)
        set_rate = context.learning_rate_setter() if self.options.staleness else None
        if self._master:
            self.load = self._master.load
            self._master.rate = set_rate or self._master.rate

    def describe(self) -> str:
        """As in `Strategy`."""
        bound, size = self.options.staleness, self.units.size
        lead = f"at most {bound} global batch{'es' * (bound > 1)} ahead" if bound else "one batch at a time"
        return f"a master deals out units of {size} micro-batch{'es' * (size > 1)}, {lead}"

    def step(self, request: StepRequest) -> float:
        """Do this rank's part of a global batch.

        The totals of the whole batch come to every rank. ``clip_norm`` is of the mean gradient that is
        applied at once. Nothing of ``limit`` is begun before all have met.

        Returns:
            The norm of the mean gradient, over several the mean of their norms, weighed by tokens.

        Raises:
            NumericError: on the master: a gradient is not finite, and has not been applied.
            LaunchError: on the master: a worker is not heard of.
        """
        self._together = False
        totals, step = request.totals, request.step
        limit = max(request.limit, step + 1)
        result = self._part.take(step, request.batches, totals.stop_wanted, request.clip_norm, limit)
        totals.set(result.counts)
        self._done = step + 1
        return result.norm

    @property
    def in_sync(self) -> bool:
        """As in `Strategy`."""
        return self._together

    def synchronize(self, replica: Any, mesh: Mesh) -> None:
        """Give all ranks the master's weights; a collective. `step` has waited for what was under way."""
        if not self._together:
            replica.give_weights(mesh.all)
            self._together = True
            if self._master:
                self._master.renew()

    def consolidate(self) -> None:
        """As in `Strategy`: the master has stepped several times a batch, and schedules count batches."""
        if self._done:
            self.context.optimizer.iterations.assign(self._done)

    def regroup(self, micro_batches: range) -> None:
        """Go on without ranks that have died; all meet again. No micro-batch is a rank's own."""
        super().regroup(micro_batches)
        self._together = False
        if self._master:
            self._master.regroup()

    def report(self) -> Report | None:
        """What the master has done so far."""
        if not self.load.updates:
            return None
        facts = self.load.report()
        mean = sum(stale * count for stale, count in self.load.staleness.items()) / self.load.updates
        text = (
            f"{facts['updates_per_s']:.1f} updates/s, busy {100 * facts['master_load']:.0f} % of the time, "
            f"gradients {mean:.1f} updates old on average"
        )
        return Report("master", text, "asynchronous.json", facts)
