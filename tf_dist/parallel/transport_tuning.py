"""Transport tuning: reduce gradients in a shared window or by messages, whichever is faster here.

Both give the same bits, so the choice is free; it is measured when training starts, on sums of the real size.
So is the chunk size of sums between nodes, on sums that take half a second together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.comm.transport.reduction_order import ReductionOrder
from tf_dist.errors import LaunchError, UsageError
from tf_dist.parallel.flat_buffer import aligned_empty

CHOICES = ("auto", "window", "messages")
# Candidate chunk sizes: small ones keep a network busy from the start, large ones cost less.
CHUNKS_BYTES = (512 << 10, 2 << 20, 8 << 20, 32 << 20)
USUAL_CHUNK_BYTES = 2 << 20
CHUNK_ROUNDS = 2
CHUNK_PROBE_S = 0.5
# How much faster than the default a chunk size must be: on a busy machine two rounds are a rough measure.
CLEARLY = 0.9
# Size of the sum that estimates how long the candidates take.
FIRST_BYTES = 1 << 20
# From this duration on, one sum of a kind is timed instead of several.
SLOW_S = 0.1
# Sums of each kind that are timed, after a warm-up.
TIMED = 3


class TransportChoice(NamedTuple):
    """Buffers for the terms (None: anywhere), and a message about the choice."""

    buffers: Callable[[], list[np.ndarray]] | None
    said: str


def choose(
    comm: Comm,
    length: int,
    order: ReductionOrder,
    wanted: str = "auto",
    chunk_bytes: int = 0,
    measure: bool = True,
) -> TransportChoice:
    """Find the fastest way for a Comm to sum terms of ``length`` float32; a collective.

    Args:
        comm: all ranks.
        length: elements of a gradient.
        order: of its sums.
        wanted: "auto", or the transport to use unconditionally.
        chunk_bytes: chunk size of sums by messages; 0: measured if ranks span nodes.
        measure: False takes a window if there is one, and the default chunk size, without timing.

    Raises:
        UsageError: ``wanted`` is unknown.
        LaunchError: on every rank: a window was requested and is not available.
    """
    if wanted not in CHOICES:
        raise UsageError(f"unknown allreduce {wanted!r}: choose one of {', '.join(CHOICES)}")
    if comm.size == 1:
        return TransportChoice(None, "on this rank alone")
    nodes = comm.nodes()
    pieces = ""
    if nodes > 1:
        comm.chunk_bytes = USUAL_CHUNK_BYTES
    if chunk_bytes or (nodes > 1 and measure):
        pieces = choose_chunk(comm, length, order, chunk_bytes)
    if wanted == "messages":
        comm.forget_buffers(length, order)
        return TransportChoice(None, f"by messages, as was asked for{pieces}")
    if wanted == "auto" and nodes == comm.size:
        comm.forget_buffers(length, order)  # buffers of another trainer
        return TransportChoice(None, f"by messages, each rank being alone on its node{pieces}")
    chosen = _choose_carrier(comm, length, order, wanted, measure)
    return TransportChoice(chosen.buffers, chosen.said + pieces)


def _choose_carrier(
    comm: Comm, length: int, order: ReductionOrder, wanted: str, measure: bool
) -> TransportChoice:
    by_messages_ms = _median_ms(comm, length, order, None) if measure else 0.0
    buffers = comm.term_buffers(length, order)
    if buffers is None:
        if wanted == "window":
            raise LaunchError(f"sums in a shared window: there is none ({comm.carried_by}). Use auto")
        return TransportChoice(
            None, f"by {comm.carried_by}" + (f", {by_messages_ms:.2f} ms" if measure else "")
        )
    if not measure:
        return TransportChoice(buffers, "in a shared window, without measuring")
    window_ms = _median_ms(comm, length, order, buffers)
    if wanted == "window" or window_ms <= by_messages_ms:
        return TransportChoice(
            buffers, f"in a shared window, {window_ms:.2f} ms (by messages {by_messages_ms:.2f} ms)"
        )
    comm.forget_buffers(length, order)
    return TransportChoice(
        None, f"by messages, {by_messages_ms:.2f} ms (in a shared window {window_ms:.2f} ms)"
    )


def choose_chunk(comm: Comm, length: int, order: ReductionOrder, wanted_bytes: int = 0) -> str:
    """Set the chunk size of sums, the same on every rank; a collective.

    Args:
        comm: all ranks; its ``chunk_bytes`` is set.
        length: elements of a gradient.
        order: of its sums.
        wanted_bytes: 0: the clearly fastest one, as measured by rank 0, on sums of `CHUNK_PROBE_S` together.

    Returns:
        A message about the choice.
    """
    if wanted_bytes:
        comm.chunk_bytes = max(4, wanted_bytes)
        return f"; in pieces of {_bytes_named(comm.chunk_bytes)}, as was asked for"
    comm.chunk_bytes = USUAL_CHUNK_BYTES
    own = _own_terms(comm, length, order)
    first = min(length, FIRST_BYTES // 4)
    _sum_s(comm, own, first, order)  # warm-up: connects the ranks
    rate = first / _sum_s(comm, own, first, order)
    tried = int(rate * CHUNK_PROBE_S / (CHUNK_ROUNDS * len(CHUNKS_BYTES)))
    tried = int(comm.broadcast_obj(min(length, tried)))
    candidates = [size for size in CHUNKS_BYTES if size < 4 * tried]
    if USUAL_CHUNK_BYTES not in candidates:  # too small, or too slow, to show a difference
        return f"; in pieces of {_bytes_named(comm.chunk_bytes)}"
    taken = dict.fromkeys(candidates, float("inf"))
    for _ in range(CHUNK_ROUNDS):
        for comm.chunk_bytes in candidates:
            taken[comm.chunk_bytes] = min(taken[comm.chunk_bytes], _sum_s(comm, own, tried, order))
    best = min(candidates, key=taken.__getitem__)
    if taken[best] > CLEARLY * taken[USUAL_CHUNK_BYTES]:
        best = USUAL_CHUNK_BYTES
    times = ", ".join(f"{_bytes_named(size)} {1e3 * taken[size]:.1f}" for size in candidates)
    comm.chunk_bytes, times = comm.broadcast_obj([best, times])
    return f"; in pieces of {_bytes_named(comm.chunk_bytes)} ({_bytes_named(4 * tried)} in ms: {times})"


def _bytes_named(size: int) -> str:
    return f"{size / (1 << 20):.3g} MiB" if size >= 1 << 20 else f"{size / 1024:.3g} KiB"


def _own_terms(comm: Comm, length: int, order: ReductionOrder) -> list[np.ndarray]:
    """Terms of this rank, at least one array, filled."""
    own = [aligned_empty(length) for _ in range(max(1, order.counts[comm.rank]))]
    for array in own:
        array.fill(0.0)
    return own


def _sum_s(comm: Comm, own: list[np.ndarray], length: int, order: ReductionOrder) -> float:
    """Seconds of a sum of the first elements by messages."""
    parts = [array[:length] for array in own]
    comm.barrier()
    begun = time.perf_counter()
    comm.allreduce_terms(parts[: order.counts[comm.rank]], order, parts[0])
    return time.perf_counter() - begun


def _median_ms(
    comm: Comm, length: int, order: ReductionOrder, buffers: Callable[[], list[np.ndarray]] | None
) -> float:
    """Median milliseconds of a sum, as measured by rank 0: all ranks must make the same choice."""
    count = order.counts[comm.rank]
    own = [aligned_empty(length) for _ in range(max(0 if buffers else count, 1 - count))]
    for array in own:
        array.fill(0.0)
    taken: list[float] = []
    while len(taken) < _wanted_times(comm, taken):
        terms = buffers() if buffers else own[:count]
        comm.barrier()
        begun = time.perf_counter()
        comm.allreduce_terms(terms, order, terms[0] if terms else own[0])
        taken.append(time.perf_counter() - begun)
    return 1e3 * float(comm.broadcast_obj(float(np.median(taken[1:]))))


def _wanted_times(comm: Comm, taken: list[float]) -> int:
    """Number of sums in all, including the first; the same on every rank."""
    if len(taken) != 1:
        return 1 + TIMED if not taken or taken[0] < SLOW_S else 2
    taken[0] = float(comm.broadcast_obj(taken[0]))
    return 1 + TIMED if taken[0] < SLOW_S else 2
