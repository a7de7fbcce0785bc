"""Gradient buckets, so that the first ones are all-reduced while the backward pass computes the others.

The backward pass ends with the first layers, so buckets are filled from the last variable on. They are large
enough to keep the network busy (Li et al. 2020, PyTorch Distributed, use 25 MB), except for the last one,
which no computation hides: it is small. Adding a bucket to the rank's sums makes the same additions as adding
the full gradient (`tf_dist.parallel.reduction_tree`), so every bit is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tf_dist.comm.transport.base import Comm, Overlapped
from tf_dist.comm.transport.reduction_order import ReductionOrder
from tf_dist.errors import LaunchError
from tf_dist.parallel.flat_buffer import FlatLayout
from tf_dist.parallel.reduction_tree import BlockSum

CHOICES = ("auto", "on", "off")
# Each bucket costs a call from TensorFlow's graph into Python, about 0.1 ms.
BUCKET_BYTES = 4 << 20
LAST_BUCKET_BYTES = 1 << 20


def divide(sizes: Sequence[int], most_bytes: int, last_bytes: int) -> list[range]:
    """Assign variables to buckets, in the order in which a backward pass produces their gradients.

    Args:
        sizes: elements of each variable, float32, first layer first.
        most_bytes: of a bucket, unless one variable alone has more.
        last_bytes: of the bucket of the first variables.

    Returns:
        Ranges of adjacent variables, by number; the last ones first.
    """
    buckets = []
    first = _count_that_fit(sizes, last_bytes)
    stop = len(sizes)
    while stop > first:
        taken = _count_that_fit(sizes[first:stop][::-1], most_bytes)
        buckets.append(range(stop - taken, stop))
        stop -= taken
    return [*buckets, range(first)]


def _count_that_fit(sizes: Sequence[int], most_bytes: int) -> int:
    """How many of the first variables fit into ``most_bytes`` together; at least one."""
    total = np.cumsum(sizes) * 4
    return max(1, int((total <= most_bytes).sum()))


class Buckets:
    """Adds the gradient of a rank's last micro-batch, bucket by bucket, to the sums of all ranks.

    Args:
        layout: of a gradient.
        sums: of this rank.
        exchange: the overlapped all-reduce.

    Attributes:
        divided: the variables of each bucket, in the order in which `add` expects them.
    """

    def __init__(self, layout: FlatLayout, sums: BlockSum, exchange: Overlapped) -> None:
        self.divided = divide(layout.sizes, BUCKET_BYTES, LAST_BUCKET_BYTES)
        self._starts = layout.starts
        self._sums, self._exchange = sums, exchange

    def begin(self) -> None:
        """Start, after all micro-batches of this rank but the last have been added."""
        self._exchange.begin(self._sums.open_last())

    def add(self, number: int, gradients: Sequence[np.ndarray]) -> None:
        """Add the gradients of a bucket's variables to the sums, and start to reduce them."""
        bucket = self.divided[number]
        for variable, gradient in zip(bucket, gradients, strict=True):
            self._sums.add_part(self._starts[variable], gradient.reshape(-1))
        self._send(bucket)

    def add_empty(self) -> None:
        """Take part in a step in which this rank has no micro-batch."""
        for bucket in self.divided:
            self._send(bucket)

    def _send(self, bucket: range) -> None:
        self._exchange.ready(slice(self._starts[bucket.start], self._starts[bucket.stop]))

    def give_up(self) -> None:
        """Abandon the exchange: this rank has failed."""
        self._exchange.give_up()


class BucketOverlap(NamedTuple):
    """Buckets, or None without overlap; and a message about the choice."""

    buckets: Buckets | None
    said: str


def choose(
    comm: Comm,
    layout: FlatLayout,
    order: ReductionOrder,
    sums: BlockSum,
    wanted: str = "auto",
    why_not: str = "",
) -> BucketOverlap:
    """Decide whether to overlap gradient reduction with the backward pass: if ranks span nodes; a collective.

    Args:
        comm: all ranks.
        layout: of a gradient.
        order: of its sums.
        sums: of this rank.
        wanted: "auto"; "on": also on one node; "off".
        why_not: a reason against it, the same on every rank.

    Raises:
        LaunchError: on every rank: "on", and overlap is not available.
    """
    if wanted == "off" or comm.size == 1:
        return BucketOverlap(None, "")
    if wanted == "auto" and comm.nodes() == 1:
        return BucketOverlap(None, "")
    exchange = None if why_not else comm.overlapped(layout.total, order)
    if exchange is None:
        reason = why_not or comm.no_overlap_because
        if wanted == "on":
            raise LaunchError(f"--overlap on: it cannot be, because {reason}. Use --overlap auto")
        return BucketOverlap(None, f"nothing leaves during the backward pass, because {reason}")
    buckets = Buckets(layout, sums, exchange)
    count = len(buckets.divided)
    return BucketOverlap(
        buckets, f"gradients leave during the backward pass, in {count} bucket{'s' * (count > 1)}"
    )


def spent(comm: Comm) -> str:
    """Status line of the time that overlapped sums took so far; empty if there were none."""
    if not comm.overlapped_sums:
        return ""
    under_way, exposed = (1e3 * s / comm.overlapped_sums for s in (comm.under_way_s, comm.exposed_s))
    return f"{under_way:.1f} ms a step under way, {exposed:.1f} ms of it waited for"
