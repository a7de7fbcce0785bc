"""The parameter server of Downpour: assigns work items, receives gradients, steps, and replies."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.transport.base import Pending
from tf_dist.comm.transport.reduction_order import add_in_order
from tf_dist.errors import RankLost
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.reduction_tree import one_each
from tf_dist.parallel.totals import TOKENS, Totals, scale_of
from tf_dist.parallel.work_queue import WorkItem, WorkQueue
from tf_dist.strategies.downpour_protocol import (
    GRADIENT_TAG,
    PUSH,
    PUSH_TAG,
    REPLY_TAG,
    TOLD,
    WEIGHTS_TAG,
    Batches,
    BatchResult,
    ServerLoad,
    WorkItems,
    WorkResult,
)
from tf_dist.strategies.waiting import wait_for, wait_until

LOG = logging.getLogger(__name__)


@dataclass
class _WorkerLink:
    """The server's state of a worker.

    head, gradient: receive buffers of its next message, and the requests. unit: its current item. version: of
    the weights it has. clock: the batch whose end it waits for; None if it does not wait. told: all batches
    before it are known to it as done.
    """

    rank: int
    head: np.ndarray
    gradient: np.ndarray
    coming: Pending | None = None
    work: Pending | None = None
    unit: WorkItem | None = None
    version: int = -1
    clock: int | None = None
    told: int = 0
    sends: list[Pending] = field(default_factory=list)


class DownpourServer:
    """Rank 0: assigns work items, receives gradients, steps. Argument: computes its own items."""

    def __init__(self, units: WorkItems) -> None:
        self._units, self._comm, self.load = units, units.comm, ServerLoad()
        self._replica, options = units.replica, units.options
        self._trains = options.master_trains == "on" or units.comm.size == 1
        self._sums = units.block_sum()
        self._queue = WorkQueue(units.units, options.staleness)
        self._peers = self._all_workers()
        self._waiting: deque[_WorkerLink] = deque()
        self._version, self._snapshot_version, self._snapshot = 0, -1, np.empty(0, np.float32)
        self._totals: dict[int, Totals] = {}
        self._norms: dict[int, list[tuple[float, float]]] = {}
        self._collected: dict[int, dict[int, np.ndarray]] = {}
        self._results: dict[int, BatchResult] = {}
        self._stop_at: int | None = None
        self._clip_norm, self._limit = 0.0, 0
        self.rate: Callable[[int, float], None] = lambda step, factor: None

    def _all_workers(self) -> list[_WorkerLink]:
        length = len(PUSH) + 3 * self._units.size
        return [
            _WorkerLink(rank, np.empty(length), aligned_empty(self._replica.parameters))
            for rank in range(1, self._comm.size)
        ]

    def take(self, clock: int, batches: Batches, stop: bool, clip_norm: float, limit: int) -> BatchResult:
        """As in `tf_dist.strategies.downpour.Downpour.step`: serve all workers until the batch is done."""
        begun = time.monotonic()
        if self._queue.done < clock:  # a resumed run
            self._queue = WorkQueue(self._units.units, self._units.options.staleness, clock)
        if self._stop_at is not None and clock >= self._stop_at:
            self._stop_at = None  # that run has stopped
        self._clip_norm = clip_norm
        self._limit = limit if self._stop_at is None else min(limit, self._stop_at)
        self._request_stop(stop)
        for peer in list(self._peers):
            with self._unless_failed(peer):
                self._post_receive(peer)

        def look() -> bool:
            unit = self._queue.next_item(self._limit) if self._trains and not self._waiting else None
            if unit is not None:
                self._accept(self._own(unit, batches))
            came = self._poll() if unit is None else True
            self._reply_to_all()
            return came

        def over() -> bool:
            # A worker that had no item of the last batch before synchronization waits for its result.
            all_know = clock + 1 < self._limit or all(peer.told > clock for peer in self._peers)
            return self._queue.done > clock and all_know

        wait_until(over, look, lambda: [peer.rank for peer in self._peers if peer.clock is None])
        self.load.served_s += time.monotonic() - begun
        self.rate(clock + 1, 1.0)
        return self._results[clock]

    def renew(self) -> None:
        """Restart after a synchronization."""
        # Callbacks may change the synchronized model: no worker has these weights. And all agree whether to
        # stop.
        self._version += 1
        self._stop_at = None

    def regroup(self) -> None:
        """Renumber ranks after failures: all is done, nothing is in flight."""
        self._peers = self._all_workers()
        for peer in self._peers:
            peer.told = self._queue.done

    # Failed workers --------------------------------------------------------------------------------

    @contextmanager
    def _unless_failed(self, peer: _WorkerLink) -> Iterator[None]:
        """Communicate with a worker; if it has failed, continue without it.

        Its item is reassigned: an incomplete gradient was not used.
        """
        try:
            yield
        except RankLost:
            self._peers = [other for other in self._peers if other is not peer]
            self._waiting = deque(other for other in self._waiting if other is not peer)
            if peer.unit is not None:
                self._queue.give_back(peer.unit)
            self._trains = self._trains or not self._peers
            first, done = self._comm.origin[peer.rank], self._queue.done
            self.load.lost.append({"rank": first, "batches_done": done})
            once(LOG, self._comm).warning(
                f"rank {first} has died after {done} batches: what it had in hand, others do"
            )

    # Receiving -------------------------------------------------------------------------------------

    def _post_receive(self, peer: _WorkerLink) -> None:
        """Post the receive of a worker's next message, unless it is posted.

        Before a synchronization, a worker without an item that knows all results sends nothing; a receive
        that was posted for it would take the message of another trainer.
        """
        if peer.coming is None and peer.clock is None and (peer.unit or peer.told < self._limit):
            peer.coming = self._comm.irecv(peer.head, peer.rank, PUSH_TAG)
            if peer.unit is not None:
                peer.work = self._comm.irecv(peer.gradient, peer.rank, GRADIENT_TAG)

    def _poll(self) -> bool:
        """Process messages that have arrived; whether there were any."""
        came = False
        for peer in list(self._peers):
            with self._unless_failed(peer):
                if peer.coming is not None and peer.coming.done():
                    came = True
                    self._receive(peer, peer.coming)
        return came

    def _receive(self, peer: _WorkerLink, coming: Pending) -> None:
        """Process a worker's message, and its gradient."""
        coming.wait()
        push = dict(zip(PUSH, peer.head, strict=False))
        if push["has_work"]:
            assert peer.unit is not None and peer.work is not None
            wait_for([peer.work], peer.rank)
            rows = peer.head[len(PUSH) :].reshape(-1, 3)
            unit, peer.unit, peer.work = peer.unit, None, None
            self._accept(WorkResult(unit, peer.gradient, rows, int(push["version"])))
        peer.coming, peer.clock = None, int(push["clock"])
        self._request_stop(bool(push["stop"]))
        self._waiting.append(peer)

    def _own(self, unit: WorkItem, batches: Batches) -> WorkResult:
        version = self._version
        return self._units.gradient(unit, batches, self._sums, self._serve_between)._replace(version=version)

    def _serve_between(self) -> None:
        """Serve workers while the server computes an item of its own."""
        if self._peers:
            self._poll()
            self._reply_to_all()

    # Gradients -------------------------------------------------------------------------------------

    def _accept(self, work: WorkResult) -> None:
        """Apply a gradient, or keep it until its batch is complete."""
        begun = time.monotonic()
        step, number = work.unit
        totals = self._totals.setdefault(step, Totals(self._units.micro_batches))
        for row, sums in enumerate(work.rows):
            totals.add(number * self._units.size + row, sums)
        if self._units.options.staleness == 0:
            kept = self._collected.setdefault(step, {})
            kept[number] = work.gradient.copy()
            if len(kept) == self._units.units:
                self._apply_batch(step, [kept[i] for i in range(len(kept))])
                del self._collected[step]
        else:
            self._apply_unit(work)
        before = self._queue.done
        self._queue.finish(work.unit)
        for done in range(before, self._queue.done):
            self._record_result(done)
        self.load.busy_s += time.monotonic() - begun

    def _apply_batch(self, step: int, gradients: list[np.ndarray]) -> None:
        """One synchronous step."""
        counts = self._totals[step].sum()
        total = add_in_order(gradients, one_each(len(gradients)).additions)
        norm = self._replica.norm(total) / max(counts[TOKENS], 1.0)
        self.rate(step, 1.0)
        self._step(total, scale_of(norm, counts, self._clip_norm), 0)
        self._norms[step] = [(norm, 1.0)]

    def _apply_unit(self, work: WorkResult) -> None:
        counts = np.append(work.rows.sum(axis=0), 0.0)
        norm = self._replica.norm(work.gradient) / max(counts[TOKENS], 1.0)
        scale = scale_of(norm, counts, self._clip_norm)
        self._norms.setdefault(work.unit.step, []).append((norm, counts[TOKENS]))
        if counts[TOKENS]:
            stale = self._version - work.version
            aware = self._units.options.staleness_aware == "on"
            self.rate(work.unit.step, 1.0 / max(1, stale) if aware else 1.0 / self._units.units)
            self._step(work.gradient, scale, stale)

    def _step(self, gradient: np.ndarray, scale: float, stale: int) -> None:
        self._replica.apply(gradient, scale)
        self._version += 1
        self.load.updates += 1
        self.load.staleness[stale] += 1

    def _record_result(self, step: int) -> None:
        """Record the result of a completed batch."""
        counts, norms = self._totals.pop(step).sum(), self._norms.pop(step)
        counts[-1] = float(self._stop_at is not None and step == self._stop_at - 1)
        weight = sum(tokens for _, tokens in norms) or 1.0
        norm = sum(norm * tokens for norm, tokens in norms) / weight
        self._results[step] = BatchResult(counts, norm)
        self._results.pop(step - self._units.told, None)

    def _request_stop(self, wanted: bool) -> None:
        """Make all ranks stop at the end of the last batch that any rank has begun."""
        if wanted and self._stop_at is None:
            self._stop_at = max(self._queue.begun, self._queue.done + 1)
            self._limit = min(self._limit, self._stop_at)

    # Replies ---------------------------------------------------------------------------------------

    def _reply_to_all(self) -> None:
        """Reply to waiting workers for which there is an item, or whose batch is done."""
        for _ in range(len(self._waiting)):
            peer = self._waiting.popleft()
            assert peer.clock is not None
            unit = self._queue.next_item(self._limit)
            if unit is None and self._queue.done <= peer.clock:
                self._waiting.append(peer)
                continue
            peer.unit, peer.clock = unit, None
            with self._unless_failed(peer):
                self._reply(peer)
                self._post_receive(peer)

    def _reply(self, peer: _WorkerLink) -> None:
        begun = time.monotonic()
        told = [[step, *result.counts, result.norm] for step, result in sorted(self._results.items())]
        told += [[-1.0] * TOLD] * (self._units.told - len(told))
        unit = peer.unit or WorkItem(0, 0)
        head = [peer.unit is not None, *unit, self._version]
        for one in peer.sends:  # previous replies: they have arrived, as the worker has answered
            one.wait()
        answer = np.array([*head, *np.ravel(told)], np.float64)
        peer.told = self._queue.done
        peer.sends = [self._comm.isend(answer, peer.rank, REPLY_TAG)]
        if peer.unit is not None and peer.version != self._version:
            peer.sends.append(self._comm.isend(self._weights(), peer.rank, WEIGHTS_TAG))
            peer.version = self._version
        self.load.busy_s += time.monotonic() - begun

    def _weights(self) -> np.ndarray:
        """The weights of this version; a new array for each, as older ones may still be in flight."""
        if self._snapshot_version != self._version:
            self._snapshot = aligned_empty(self._replica.parameters)
            self._replica.read_weights(self._snapshot)
            self._snapshot_version = self._version
        return self._snapshot
