"""Downpour's work items: how a rank computes one, and the messages between ranks.

`downpour_server` has the server's side, `downpour_worker` a worker's; `downpour` explains the algorithm.

Legend: P parameters, S staleness, n micro-batches of a work item.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.parallel.reduction_tree import BlockSum
from tf_dist.parallel.totals import GradientReplica
from tf_dist.parallel.work_queue import WorkItem
from tf_dist.strategies.base import option
from tf_dist.strategies.waiting import master_trains

# Tags of messages to and from the server.
PUSH_TAG, GRADIENT_TAG, REPLY_TAG, WEIGHTS_TAG = 700, 701, 702, 703
# Message fields: float64, in which integers up to 2 ** 53 are exact.
PUSH = ("has_work", "step", "number", "version", "stop", "clock")
REPLY = ("has_unit", "step", "number", "version")
# Length of a batch result in a reply: its step, counts (4) and norm.
TOLD = 6

Batches = Callable[[int, range], Sequence[Any]]


@dataclass(frozen=True)
class DownpourOptions:
    """Options of Downpour.

    Attributes:
        staleness: S, global batches by which the fastest may lead the slowest.
        staleness_aware: "on": a gradient's learning rate is divided by its staleness, the number of updates
            since the weights that it was computed with (Zhang et al. 2016); "off": it is multiplied by the
            item's share of the global batch, so that a batch moves the weights as far as a synchronous step.
        master_trains: "on": rank 0 computes items as well, and serves the others between micro-batches.
    """

    staleness: int = option(
        1,
        "Downpour",
        "maximum global batches by which the fastest downpour worker may lead the slowest; 0: as "
        "allreduce, bit for bit",
        least=0,
    )
    staleness_aware: str = option(
        "off",
        "Downpour",
        "divide the learning rate of a downpour gradient by its staleness",
        choices=("on", "off"),
    )
    master_trains: str = master_trains()


class WholeReplica(GradientReplica, Protocol):
    """A rank's full model."""

    def gradients(
        self, x_BxT: np.ndarray, y_BxT: np.ndarray, draw: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The summed gradient of a micro-batch, (P,), and its loss, tokens and correct predictions, (3,)."""

    def broadcast_initial_weights(self, comm: Comm) -> None:
        """Broadcast the weights of the first rank; a collective."""


class BatchResult(NamedTuple):
    """Of a global batch: loss, tokens, correct predictions and stop flag, (4,); and the gradient's norm."""

    counts: np.ndarray
    norm: float


@dataclass
class ServerLoad:
    """Load of the server. staleness: histogram of gradients by staleness; updates: optimizer steps.

    busy_s: seconds of applying gradients and copying weights; served_s: of serving workers in total. lost:
    failed workers, each with the number of batches done by then.
    """

    staleness: Counter[int] = field(default_factory=Counter)
    updates: int = 0
    busy_s: float = 0.0
    served_s: float = 0.0
    lost: list[dict[str, int]] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """For a file: the histogram, updates per second of service, and the busy fraction of it."""
        served = max(self.served_s, 1e-9)
        return {
            "staleness": {str(stale): count for stale, count in sorted(self.staleness.items())},
            "updates": self.updates,
            "updates_per_s": self.updates / served,
            "master_load": self.busy_s / served,
            "lost": self.lost,
        }


class WorkResult(NamedTuple):
    """A work item, its gradient sum (P,), and loss, tokens and correct predictions per micro-batch, (n, 3).

    version: of the weights that it was computed with.
    """

    unit: WorkItem
    gradient: np.ndarray
    rows: np.ndarray
    version: int = 0


class WorkItems:
    """Computes work items on a rank.

    Args:
        replica: of this rank.
        comm: all ranks.
        micro_batches: of a global batch.
        size: n, micro-batches of an item.
        options: of Downpour.

    Attributes:
        units: items of a global batch.
        told: maximum number of batch results in a reply: S that were done before its item was assigned,
            its own, and S whose items others have done meanwhile.
    """

    def __init__(
        self, replica: WholeReplica, comm: Comm, micro_batches: int, size: int, options: DownpourOptions
    ) -> None:
        self.replica, self.comm, self.options = replica, comm, options
        self.micro_batches, self.size, self.units = micro_batches, size, micro_batches // size
        self.told = 2 * options.staleness + 1

    def gradient(
        self, unit: WorkItem, batches: Batches, sums: BlockSum, between: Callable[[], None]
    ) -> WorkResult:
        """Compute an item, calling ``between`` between its micro-batches."""
        numbers = range(unit.number * self.size, (unit.number + 1) * self.size)
        rows = np.zeros((self.size, 3))
        for row, (number, x_BxT, y_BxT) in zip(rows, batches(unit.step, numbers), strict=True):
            gradient, row[:] = self.replica.gradients(x_BxT, y_BxT, (unit.step, number))
            sums.add(gradient)
            between()
        (gradient,) = sums.terms()
        return WorkResult(unit, gradient, rows)

    def block_sum(self) -> BlockSum:
        """Adds the gradients of an item, in the order of its subtree."""
        leaves = range(self.size)
        return BlockSum(self.replica.parameters, leaves, leaves)
