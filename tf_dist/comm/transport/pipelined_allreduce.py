"""Pipelined all-reduce of terms by messages, in chunks: one is in flight while another is added.

Every rank adds its slice of all terms, then the slices are all-gathered: a rank sends 2 (R-1)/R of the bytes,
where each has one term. That is what Rabenseifner's algorithm moves (Thakur et al. 2005); a rank with k terms
sends k times as much in the first half. A large array is sent in chunks, several at a time, so that the
network stays busy while a rank adds.

A chunk is a generator of requests: it continues when those that it has yielded are complete. So the same code
serves a rank that waits (`allreduce_in_chunks`) and a thread that polls
(`tf_dist.comm.transport.overlapped_allreduce`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from tf_dist.comm.transport.reduction_order import ReductionOrder, add_in_order, slices

# Chunks in flight: one whose terms arrive, one whose sum is sent, and one between.
DEPTH = 3
# Messages of one chunk have tags of their own, of which every MPI has at least 32,767.
TAGS_PER_CHUNK, CHUNKS_WITH_OWN_TAGS = 128, 128
GATHER_TAG = TAGS_PER_CHUNK - 1

Requests = list[Any]


class BufferPool:
    """Buffers reused by later sums: fresh memory costs a page fault every 4 KiB."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, length: int, dtype: np.dtype) -> np.ndarray:
        """An array of some length, uninitialized."""
        needed = length * dtype.itemsize
        for place, kept in enumerate(self._free):
            if kept.size >= needed:
                return self._free.pop(place)[:needed].view(dtype)
        return np.empty(needed, np.uint8).view(dtype)

    def give_back(self, arrays: Sequence[np.ndarray]) -> None:
        """Return arrays to the pool once they are no longer used."""
        self._free += [array.base for array in arrays if isinstance(array.base, np.ndarray)]


def sent_elements(length: int, terms: int, rank: int, ranks: int) -> int:
    """Number of elements a rank sends to all-reduce an array, for any number of chunks.

    Args:
        length: of the array.
        terms: that this rank has.
        rank: this one.
        ranks: number of ranks, each of which adds its slice.
    """
    part = slices(length, ranks)[rank]
    own = part.stop - part.start
    return int(terms * (length - own) + own * (ranks - 1))


def allreduce_chunk(
    mpi: Any,
    terms: Sequence[np.ndarray],
    order: ReductionOrder,
    out: np.ndarray,
    number: int,
    memory: BufferPool,
) -> Iterator[Requests]:
    """All-reduce the terms of all ranks into ``out``; yields the requests that must be complete to continue.

    Args:
        mpi: a communicator of the ranks, used by nothing else while this runs.
        terms: this rank's, each of the length of ``out``; their content is lost.
        order: the same on every rank.
        out: may be the first of the terms.
        number: of the chunk: distinguishes chunks in flight by their tags.
        memory: receive buffers.
    """
    rank, parts = mpi.Get_rank(), slices(out.size, mpi.Get_size())
    mine, tag = parts[rank], number % CHUNKS_WITH_OWN_TAGS * TAGS_PER_CHUNK
    requests: Requests = []
    values: list[np.ndarray] = []
    borrowed: list[np.ndarray] = []
    others = [(other, part) for other, part in enumerate(parts) if other != rank and part.stop > part.start]
    for source, count in enumerate(order.counts):
        if source == rank:
            values += [term[mine] for term in terms]
            continue
        came = [memory.take(mine.stop - mine.start, out.dtype) for _ in range(count)]
        values += came
        borrowed += came
        if mine.stop > mine.start:
            requests += [mpi.Irecv(array, source, tag + at) for at, array in enumerate(came)]
    for other, part in others:
        requests += [mpi.Isend(term[part], other, tag + at) for at, term in enumerate(terms)]
    yield requests
    total, target = add_in_order(values, order.additions), out[mine]
    if total.ctypes.data != target.ctypes.data:
        np.copyto(target, total)
    # Not earlier: the next receive may overwrite the terms that were just sent.
    requests = [mpi.Irecv(out[part], other, tag + GATHER_TAG) for other, part in others]
    if target.size:
        requests += [
            mpi.Isend(target, other, tag + GATHER_TAG) for other in range(len(parts)) if other != rank
        ]
    memory.give_back(borrowed)
    yield requests


def pieces(length: int, elements: int) -> list[slice]:
    """Split ``length`` elements into chunks of at most ``elements``."""
    step = max(1, elements)
    return [slice(start, min(length, start + step)) for start in range(0, length, step)]


def allreduce_in_chunks(
    mpi: Any,
    terms: Sequence[np.ndarray],
    order: ReductionOrder,
    out: np.ndarray,
    elements: int,
    memory: BufferPool,
) -> None:
    """`allreduce_chunk` for a full array, in chunks of ``elements``; returns when it is complete."""
    adding: deque[tuple[Iterator[Requests], Requests]] = deque()
    gathering: deque[Requests] = deque()

    def add_the_oldest() -> None:
        work, requests = adding.popleft()
        MPI.Request.Waitall(requests)
        gathering.append(next(work))

    for number, piece in enumerate(pieces(out.size, elements)):
        work = allreduce_chunk(mpi, [term[piece] for term in terms], order, out[piece], number, memory)
        adding.append((work, next(work)))
        if len(adding) == 2:
            add_the_oldest()
        if len(gathering) == DEPTH - 1:
            MPI.Request.Waitall(gathering.popleft())
    while adding:
        add_the_oldest()
    for requests in gathering:
        MPI.Request.Waitall(requests)
