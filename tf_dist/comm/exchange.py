"""Sums of terms that lie on several ranks, by messages, in pieces: one travels while another is added.

Every rank adds its slice of all terms, then the slices are gathered: a rank sends 2 (R-1)/R of the bytes,
where each has one term. That is what Rabenseifner's algorithm moves (Thakur et al. 2005); a rank with k terms
sends k times as much in the first half. A large array goes in pieces, several at a time, so that the network
also has something to carry while a rank adds.

A piece is a generator of requests: it goes on when those that it has yielded are complete. So the same lines
serve a rank that waits (`sum_in_pieces`) and a thread that only looks now and then (`tf_dist.comm.overlap`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from tf_dist.comm.sums import Order, add_in_order, slices

# Pieces under way at once: one whose terms come in, one whose sum goes out, and one between.
DEPTH = 3
# Messages of one piece have tags of their own, of which every MPI has at least 32,767.
TAGS_OF_A_PIECE, PIECES_TOLD_APART = 128, 128
GATHER_TAG = TAGS_OF_A_PIECE - 1

Requests = list[Any]


class Memory:
    """Buffers that are kept from one sum to the next: fresh memory costs a page fault every 4 KiB."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, length: int, dtype: np.dtype) -> np.ndarray:
        """An array of some length, its content that of chance."""
        needed = length * dtype.itemsize
        for place, kept in enumerate(self._free):
            if kept.size >= needed:
                return self._free.pop(place)[:needed].view(dtype)
        return np.empty(needed, np.uint8).view(dtype)

    def give_back(self, arrays: Sequence[np.ndarray]) -> None:
        """Take arrays back once nobody looks at them."""
        self._free += [array.base for array in arrays if isinstance(array.base, np.ndarray)]


def sent_elements(length: int, terms: int, rank: int, ranks: int) -> int:
    """How many elements a rank sends to sum an array, in one piece or in any number of them alike.

    Args:
        length: of the array.
        terms: that this rank has.
        rank: which.
        ranks: that add, each its slice.
    """
    part = slices(length, ranks)[rank]
    own = part.stop - part.start
    return int(terms * (length - own) + own * (ranks - 1))


def sum_of_piece(
    mpi: Any, terms: Sequence[np.ndarray], order: Order, out: np.ndarray, number: int, memory: Memory
) -> Iterator[Requests]:
    """Add the terms of all ranks into ``out``, everywhere; yields what must be complete before it goes on.

    Args:
        mpi: a communicator of the ranks, for nobody else's use while this runs.
        terms: this rank's, each of the length of ``out``; their content is lost.
        order: the same on every rank.
        out: may be the first of the terms.
        number: of the piece: pieces that are under way at once are told apart by it.
        memory: to receive in.
    """
    rank, parts = mpi.Get_rank(), slices(out.size, mpi.Get_size())
    mine, tag = parts[rank], number % PIECES_TOLD_APART * TAGS_OF_A_PIECE
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
    # Not sooner: what is received next may lie where the terms were that have just been sent.
    requests = [mpi.Irecv(out[part], other, tag + GATHER_TAG) for other, part in others]
    if target.size:
        requests += [
            mpi.Isend(target, other, tag + GATHER_TAG) for other in range(len(parts)) if other != rank
        ]
    memory.give_back(borrowed)
    yield requests


def pieces(length: int, elements: int) -> list[slice]:
    """``length`` elements in pieces of at most so many."""
    step = max(1, elements)
    return [slice(start, min(length, start + step)) for start in range(0, length, step)]


def sum_in_pieces(
    mpi: Any, terms: Sequence[np.ndarray], order: Order, out: np.ndarray, elements: int, memory: Memory
) -> None:
    """`sum_of_piece` of a whole array, in pieces of some elements; returns when all is there."""
    adding: deque[tuple[Iterator[Requests], Requests]] = deque()
    gathering: deque[Requests] = deque()

    def add_the_oldest() -> None:
        work, requests = adding.popleft()
        MPI.Request.Waitall(requests)
        gathering.append(next(work))

    for number, piece in enumerate(pieces(out.size, elements)):
        work = sum_of_piece(mpi, [term[piece] for term in terms], order, out[piece], number, memory)
        adding.append((work, next(work)))
        if len(adding) == 2:
            add_the_oldest()
        if len(gathering) == DEPTH - 1:
            MPI.Request.Waitall(gathering.popleft())
    while adding:
        add_the_oldest()
    for requests in gathering:
        MPI.Request.Waitall(requests)
