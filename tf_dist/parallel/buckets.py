"""Gradients in buckets, so that the first ones leave while the backward pass still computes the others.

The backward pass ends with the first layers, so buckets are filled from the last variable on. They are large
enough for the network not to wait (Li et al. 2020, PyTorch Distributed, use 25 MB), but the last one, which
nothing is left to hide, is small. Adding a bucket to the rank's sums makes the very additions that the whole
gradient would have made (`tf_dist.parallel.tree`), so that no bit is different.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tf_dist.comm.base import Comm, Overlapped
from tf_dist.comm.sums import Order
from tf_dist.errors import LaunchError
from tf_dist.parallel.flat import FlatLayout
from tf_dist.parallel.tree import BlockSum

CHOICES = ("auto", "on", "off")
# Each bucket costs a call from TensorFlow's graph into Python, about 0.1 ms.
BUCKET_BYTES = 4 << 20
LAST_BUCKET_BYTES = 1 << 20


def divide(sizes: Sequence[int], most_bytes: int, last_bytes: int) -> list[range]:
    """Variables in buckets, in the order in which a backward pass makes their gradients.

    Args:
        sizes: elements of each variable, float32, first layer first.
        most_bytes: of a bucket, unless one variable alone has more.
        last_bytes: of the bucket of the first variables.

    Returns:
        Neighbouring variables, by number; the last ones first.
    """
    buckets = []
    first = _while_it_fits(sizes, last_bytes)
    stop = len(sizes)
    while stop > first:
        taken = _while_it_fits(sizes[first:stop][::-1], most_bytes)
        buckets.append(range(stop - taken, stop))
        stop -= taken
    return [*buckets, range(first)]


def _while_it_fits(sizes: Sequence[int], most_bytes: int) -> int:
    """How many of the first variables have so many bytes together; at least one."""
    total = np.cumsum(sizes) * 4
    return max(1, int((total <= most_bytes).sum()))


class Buckets:
    """The gradient of a rank's last micro-batch, bucket by bucket into the sums of all ranks.

    Args:
        layout: of a gradient.
        sums: of this rank.
        exchange: the sums of all ranks.

    Attributes:
        divided: the variables of each bucket, in the order in which `add` wants them.
    """

    def __init__(self, layout: FlatLayout, sums: BlockSum, exchange: Overlapped) -> None:
        self.divided = divide(layout.sizes, BUCKET_BYTES, LAST_BUCKET_BYTES)
        self._starts = layout.starts
        self._sums, self._exchange = sums, exchange

    def begin(self) -> None:
        """All micro-batches of this rank but the last have been added."""
        self._exchange.begin(self._sums.open_last())

    def add(self, number: int, gradients: Sequence[np.ndarray]) -> None:
        """Add the gradients of a bucket's variables to the sums, and let them go."""
        bucket = self.divided[number]
        for variable, gradient in zip(bucket, gradients, strict=True):
            self._sums.add_part(self._starts[variable], gradient.reshape(-1))
        self._leave(bucket)

    def add_nothing(self) -> None:
        """Take part in the sums of a step in which this rank has no micro-batch."""
        for bucket in self.divided:
            self._leave(bucket)

    def _leave(self, bucket: range) -> None:
        self._exchange.ready(slice(self._starts[bucket.start], self._starts[bucket.stop]))

    def give_up(self) -> None:
        """Leave the exchange: this rank has failed."""
        self._exchange.give_up()


class Overlap(NamedTuple):
    """Buckets, or None where nothing is overlapped; and what to say about it."""

    buckets: Buckets | None
    said: str


def choose(
    comm: Comm, layout: FlatLayout, order: Order, sums: BlockSum, wanted: str = "auto", why_not: str = ""
) -> Overlap:
    """Decide whether gradients leave during the backward pass: where ranks span nodes; a collective.

    Args:
        comm: all ranks.
        layout: of a gradient.
        order: of its sums.
        sums: of this rank.
        wanted: "auto", "on" also on one node, "off".
        why_not: what speaks against it, on every rank alike.

    Raises:
        LaunchError: "on", and it cannot be had.
    """
    if wanted == "off" or comm.size == 1:
        return Overlap(None, "")
    if wanted == "auto" and comm.nodes() == 1:
        return Overlap(None, "")
    exchange = None if why_not else comm.overlapped(layout.total, order)
    if exchange is None:
        reason = why_not or comm.no_overlap_because
        if wanted == "on":
            raise LaunchError(f"--overlap on: it cannot be, because {reason}. Use --overlap auto")
        return Overlap(None, f"nothing leaves during the backward pass, because {reason}")
    buckets = Buckets(layout, sums, exchange)
    count = len(buckets.divided)
    return Overlap(buckets, f"gradients leave during the backward pass, in {count} bucket{'s' * (count > 1)}")


def spent(comm: Comm) -> str:
    """What overlapped sums have cost so far, for a person; nothing where there were none."""
    if not comm.overlapped_sums:
        return ""
    under_way, exposed = (1e3 * s / comm.overlapped_sums for s in (comm.under_way_s, comm.exposed_s))
    return f"{under_way:.1f} ms a step under way, {exposed:.1f} ms of it waited for"
