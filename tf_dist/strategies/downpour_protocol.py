"""Downpour's units of a global batch: how a rank computes one, and how ranks write to each other.

What the master does with them is in `downpour_server`, what a worker does in `downpour_worker`; `downpour`
says why.

Legend: P parameters, S staleness, n micro-batches of a unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.parallel.dealing import Unit
from tf_dist.parallel.totals import Replica
from tf_dist.parallel.tree import BlockSum
from tf_dist.strategies.base import option
from tf_dist.strategies.waiting import master_trains

# Of messages to and from the master.
PUSH_TAG, GRADIENT_TAG, REPLY_TAG, WEIGHTS_TAG = 700, 701, 702, 703
# Messages: float64, in which whole numbers up to 2 ** 53 are exact.
PUSH = ("has_work", "step", "number", "version", "stop", "clock")
REPLY = ("has_unit", "step", "number", "version")
# Of each batch that a reply tells of: its step, counts (4) and norm.
TOLD = 6

Batches = Callable[[int, range], Sequence[Any]]


@dataclass(frozen=True)
class DownpourOptions:
    """How workers and master deal with each other.

    Attributes:
        staleness: S, global batches by which the fastest may lead the slowest.
        staleness_aware: "on": a gradient's learning rate is divided by its staleness, the number of updates
            since the weights that it was computed with (Zhang et al. 2016); "off": it is multiplied by the
            unit's share of the global batch, so that a batch moves the weights as far as a synchronous step.
        master_trains: "on": rank 0 takes units as well, and looks after the others between micro-batches.
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


class WholeReplica(Replica, Protocol):
    """A rank's whole model."""

    def gradients(
        self, x_BxT: np.ndarray, y_BxT: np.ndarray, draw: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The summed gradient of a micro-batch, (P,), and its loss, tokens and right guesses, (3,)."""

    def give_weights(self, comm: Comm) -> None:
        """Give all ranks the weights of the first one; a collective."""


class Result(NamedTuple):
    """Of a global batch: loss, tokens, right guesses and whether to stop, (4,); and the gradient's norm."""

    counts: np.ndarray
    norm: float


@dataclass
class Load:
    """What the master did. staleness: how many gradients were how stale; updates: optimizer steps.

    busy_s: seconds of applying and of copying weights; served_s: of looking after workers in all. lost:
    workers that have died, each with the batches that were done by then.
    """

    staleness: Counter[int] = field(default_factory=Counter)
    updates: int = 0
    busy_s: float = 0.0
    served_s: float = 0.0
    lost: list[dict[str, int]] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """For a file: the histogram, updates per second of service, and the share of it that was work."""
        served = max(self.served_s, 1e-9)
        return {
            "staleness": {str(stale): count for stale, count in sorted(self.staleness.items())},
            "updates": self.updates,
            "updates_per_s": self.updates / served,
            "master_load": self.busy_s / served,
            "lost": self.lost,
        }


class Work(NamedTuple):
    """A unit, its summed gradient (P,), and of its micro-batches loss, tokens and right guesses, (n, 3).

    version: of the weights that it was computed with.
    """

    unit: Unit
    gradient: np.ndarray
    rows: np.ndarray
    version: int = 0


class Units:
    """Of a rank, which computes some of them.

    Args:
        replica: of this rank.
        comm: all ranks.
        micro_batches: of a global batch.
        size: n, micro-batches of a unit.
        options: how workers and master deal with each other.

    Attributes:
        units: of a global batch.
        told: of so many batches a worker may not have heard: S that were done before its unit was dealt out,
            its own, and S whose units others have done meanwhile.
    """

    def __init__(
        self, replica: WholeReplica, comm: Comm, micro_batches: int, size: int, options: DownpourOptions
    ) -> None:
        self.replica, self.comm, self.options = replica, comm, options
        self.micro_batches, self.size, self.units = micro_batches, size, micro_batches // size
        self.told = 2 * options.staleness + 1

    def gradient(self, unit: Unit, batches: Batches, sums: BlockSum, between: Callable[[], None]) -> Work:
        """Compute a unit, and look elsewhere between its micro-batches."""
        numbers = range(unit.number * self.size, (unit.number + 1) * self.size)
        rows = np.zeros((self.size, 3))
        for row, (number, x_BxT, y_BxT) in zip(rows, batches(unit.step, numbers), strict=True):
            gradient, row[:] = self.replica.gradients(x_BxT, y_BxT, (unit.step, number))
            sums.add(gradient)
            between()
        (gradient,) = sums.terms()
        return Work(unit, gradient, rows)

    def block_sum(self) -> BlockSum:
        """Adds the gradients of a unit, in the order of its subtree."""
        leaves = range(self.size)
        return BlockSum(self.replica.parameters, leaves, leaves)
