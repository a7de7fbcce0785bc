"""What carries the sums of gradients: a shared window or messages, by what is faster here.

Both give the same bits, so the choice is free; it is measured when training begins, on sums of the real size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tf_dist.comm.base import Comm, Order
from tf_dist.errors import LaunchError, UsageError
from tf_dist.parallel.flat import aligned_empty

CHOICES = ("auto", "window", "messages")
# Sums of each kind that are timed, after one that is not.
TIMED = 3


class Carrier(NamedTuple):
    """Where terms belong (None: anywhere), and what to say about it."""

    buffers: Callable[[], list[np.ndarray]] | None
    said: str


def choose(comm: Comm, length: int, order: Order, wanted: str = "auto", measure: bool = True) -> Carrier:
    """Find out how a Comm best sums terms of ``length`` float32; a collective.

    Args:
        comm: all ranks.
        length: elements of a gradient.
        order: of its sums.
        wanted: "auto", or one of them whatever it costs.
        measure: False takes a window where there is one, without timing any sum.

    Raises:
        UsageError: ``wanted`` is unknown.
        LaunchError: a window was wanted and cannot be had.
    """
    if wanted not in CHOICES:
        raise UsageError(f"unknown allreduce {wanted!r}: choose one of {', '.join(CHOICES)}")
    if comm.size == 1:
        return Carrier(None, "on this rank alone")
    if wanted == "messages":
        comm.forget_buffers(length, order)
        return Carrier(None, "by messages, as was asked for")
    by_messages_ms = _median_ms(comm, length, order, None) if measure else 0.0
    buffers = comm.term_buffers(length, order)
    if buffers is None:
        if wanted == "window":
            raise LaunchError(f"--allreduce window: there is none ({comm.carried_by}). Use --allreduce auto")
        return Carrier(None, f"by {comm.carried_by}" + (f", {by_messages_ms:.2f} ms" if measure else ""))
    if not measure:
        return Carrier(buffers, "in a shared window, without measuring")
    window_ms = _median_ms(comm, length, order, buffers)
    if wanted == "window" or window_ms <= by_messages_ms:
        return Carrier(
            buffers, f"in a shared window, {window_ms:.2f} ms (by messages {by_messages_ms:.2f} ms)"
        )
    comm.forget_buffers(length, order)
    return Carrier(None, f"by messages, {by_messages_ms:.2f} ms (in a shared window {window_ms:.2f} ms)")


def _median_ms(
    comm: Comm, length: int, order: Order, buffers: Callable[[], list[np.ndarray]] | None
) -> float:
    """Median milliseconds of a sum, as rank 0 has it: all ranks must choose alike."""
    count = order.counts[comm.rank]
    own = [aligned_empty(length) for _ in range(max(0 if buffers else count, 1 - count))]
    for array in own:
        array.fill(0.0)
    taken = []
    for _ in range(1 + TIMED):
        terms = buffers() if buffers else own[:count]
        comm.barrier()
        begun = time.perf_counter()
        comm.allreduce_terms(terms, order, terms[0] if terms else own[0])
        taken.append(time.perf_counter() - begun)
    return 1e3 * float(comm.broadcast_obj(float(np.median(taken[1:]))))
