"""Downpour: an asynchronous parameter server; workers push gradients and pull weights independently.

Rank 0 is the server. It assigns *work items* of a global batch (`tf_dist.parallel.work_queue`), applies each
gradient as it arrives, and answers with new weights and the next item (Dean et al. 2012). No rank waits for
the slowest, except for the bound of `--staleness S`. With S = 0 the gradients of a batch are collected, added
in tree order and applied as one: that is `--strategy allreduce`, bit for bit, with dynamic load balancing.

For every rank a step of the Trainer is a global batch: it ends when the server has reported the batch as
done, with its losses. So all ranks log the same numbers, each as soon as it receives them.

    worker                                    server
    ready, or (item, gradient, losses)  --->  apply, or collect; is a batch done?
    (item, weights), done, losses       <---  as soon as an item is available, or the worker's batch is done

Legend: P parameters, S staleness, n micro-batches of a work item.
"""

from __future__ import annotations

from typing import Any

from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.work_queue import micro_batches_of_an_item
from tf_dist.strategies.base import Context, Report, Setting, StepRequest, Strategy, Traits
from tf_dist.strategies.downpour_protocol import DownpourOptions, ServerLoad, WorkItems
from tf_dist.strategies.downpour_server import DownpourServer
from tf_dist.strategies.downpour_worker import DownpourWorker
from tf_dist.strategies.waiting import check_worker


class Downpour(Strategy):
    """Asynchronous SGD with a parameter server, whose optimizer is the only one that counts.

    Attributes:
        units: computes this rank's work items.
        load: of the server.
    """

    name, Options = "downpour", DownpourOptions
    traits = Traits(replicas_equal=False, lockstep=False, sums_gradients=False, optimizer_on_root=True)

    def __init__(self, options: DownpourOptions | None = None, **given: Any) -> None:
        super().__init__(options, **given)
        self._done, self._together = 0, True
        self.load = ServerLoad()

    def check(self, setting: Setting) -> None:
        """As in `Strategy`."""
        check_worker(self, setting)

    def assignment(self, count: int, mesh: Mesh) -> range:
        """Empty: the server assigns them."""
        return range(0)

    def setup(self, context: Context) -> None:
        """As in `Strategy`."""
        super().setup(context)
        comm = context.mesh.all
        workers = max(1, comm.size - (self.options.master_trains == "off"))
        size = micro_batches_of_an_item(context.count, workers)
        self.units = WorkItems(context.replica, comm, context.count, size, self.options)
        self._master = DownpourServer(self.units) if comm.rank == 0 else None
        self._part: DownpourServer | DownpourWorker = self._master or DownpourWorker(self.units)
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

        Every rank gets the totals of the global batch. ``clip_norm`` applies to the mean gradient of each
        optimizer step. No item of ``limit`` starts before all ranks have synchronized.

        Returns:
            The norm of the mean gradient, over several the mean of their norms, weighted by tokens.

        Raises:
            NumericError: on the server: a gradient is not finite, and was not applied.
            LaunchError: on the server: a worker does not answer.
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
        """Broadcast the server's weights; a collective. `step` has waited for messages in flight."""
        if not self._together:
            replica.broadcast_initial_weights(mesh.all)
            self._together = True
            if self._master:
                self._master.renew()

    def consolidate(self) -> None:
        """As in `Strategy`: the server takes several steps a batch, but schedules count batches."""
        if self._done:
            self.context.optimizer.iterations.assign(self._done)

    def regroup(self, micro_batches: range) -> None:
        """Continue without failed ranks; all synchronize. Micro-batches are not assigned to ranks."""
        super().regroup(micro_batches)
        self._together = False
        if self._master:
            self._master.regroup()

    def report(self) -> Report | None:
        """Statistics of the server so far."""
        if not self.load.updates:
            return None
        facts = self.load.report()
        mean = sum(stale * count for stale, count in self.load.staleness.items()) / self.load.updates
        text = (
            f"{facts['updates_per_s']:.1f} updates/s, busy {100 * facts['master_load']:.0f} % of the time, "
            f"gradients {mean:.1f} updates old on average"
        )
        return Report("master", text, "asynchronous.json", facts)
