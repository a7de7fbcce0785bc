"""A worker of Downpour: it computes work items assigned by the server."""

from __future__ import annotations

import numpy as np

from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.work_queue import WorkItem
from tf_dist.strategies.downpour_protocol import (
    GRADIENT_TAG,
    PUSH_TAG,
    REPLY,
    REPLY_TAG,
    TOLD,
    WEIGHTS_TAG,
    Batches,
    BatchResult,
    WorkItems,
    WorkResult,
)
from tf_dist.strategies.waiting import wait_for


class DownpourWorker:
    """A rank that computes work items. Argument: computes them."""

    def __init__(self, units: WorkItems) -> None:
        self._units, self._comm = units, units.comm
        self._sums = units.block_sum()
        self._unit: WorkItem | None = None
        self._version = -1
        self._results: dict[int, BatchResult] = {}
        self._weights = aligned_empty(units.replica.parameters)

    def take(self, clock: int, batches: Batches, stop: bool, clip_norm: float, limit: int) -> BatchResult:
        """As in `tf_dist.strategies.downpour.Downpour.step`: work until the batch is reported as done."""
        while clock not in self._results:
            work = None
            if self._unit is not None:
                work = self._units.gradient(self._unit, batches, self._sums, _nothing)
            self._push(work, stop, clock)
            self._receive()
        return self._results.pop(clock)

    def _push(self, work: WorkResult | None, stop: bool, clock: int) -> None:
        unit = work.unit if work else WorkItem(0, 0)
        head = np.array([work is not None, *unit, self._version, stop, clock], np.float64)
        rows = work.rows if work else np.zeros((self._units.size, 3))
        sends = [self._comm.isend(np.concatenate([head, rows.reshape(-1)]), 0, PUSH_TAG)]
        if work:
            sends.append(self._comm.isend(work.gradient, 0, GRADIENT_TAG))
        wait_for(sends, 0)

    def _receive(self) -> None:
        """Receive the server's reply: results, and perhaps an item with weights."""
        told = self._units.told
        answer = np.empty(len(REPLY) + TOLD * told)
        wait_for([self._comm.irecv(answer, 0, REPLY_TAG)], 0)
        reply = dict(zip(REPLY, answer, strict=False))
        for step, *counts, norm in answer[len(REPLY) :].reshape(told, TOLD):
            if step >= 0:
                self._results.setdefault(int(step), BatchResult(np.array(counts), float(norm)))
        self._unit = None
        if reply["has_unit"]:
            self._unit = WorkItem(int(reply["step"]), int(reply["number"]))
            if reply["version"] != self._version:
                wait_for([self._comm.irecv(self._weights, 0, WEIGHTS_TAG)], 0)
                self._units.replica.write_weights(self._weights)
                self._version = int(reply["version"])


def _nothing() -> None:
    pass
