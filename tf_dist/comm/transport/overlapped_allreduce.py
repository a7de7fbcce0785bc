"""Overlapped all-reduce: parts of a sum are exchanged by a thread while the rank still computes.

A rank has one core, and its main thread is inside TensorFlow. So the thread posts nonblocking messages, polls
them now and then, and sleeps in between: polling lets MPI progress. Parts are exchanged in the order in which
they become ready, which is the same on all ranks, by the same code as sums without overlap
(`tf_dist.comm.transport.pipelined_allreduce`), so in the same order of additions, and with the same bits.

If the ranks of a node share a window, a chunk starts when all of them have reached it; each rank then adds
its slice of the node's terms and exchanges it between nodes. A sum ends when all ranks of the node have
finished.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from tf_dist.comm.transport import large_counts
from tf_dist.comm.transport.base import Comm, Overlapped
from tf_dist.comm.transport.pipelined_allreduce import (
    DEPTH,
    BufferPool,
    Requests,
    allreduce_chunk,
    pieces,
    sent_elements,
)
from tf_dist.comm.transport.reduction_order import Reduced, ReductionOrder, add_in_order, slices
from tf_dist.comm.transport.shared_memory import NodeShare, SharedWindow

# Polling interval of messages in flight. A poll takes some 20 us of the core that computes.
LOOK_EVERY_S = 0.0005
# How long a failing rank waits for its thread to stop.
STOP_S = 1.0


class TermLayout(NamedTuple):
    """Where the terms of a sum are stored, and which ranks add them.

    window: that of the node; None: each rank stores its own terms, and counts as a node.
    node, between: private communicators: the ranks of a node, and those that exchange a slice.
    share: additions within the node. rest: the order of the remaining ones, between nodes.
    """

    window: SharedWindow | None
    node: Any
    between: Any
    share: NodeShare
    rest: ReductionOrder


class OverlappedAllreduce(Overlapped):
    """`Overlapped` by a thread, which sleeps while there is no work.

    Args:
        comm: provides ``chunk_bytes``, and counts sums and seconds.
        length: elements of a term.
        places: of the terms.
    """

    def __init__(self, comm: Comm, length: int, places: TermLayout) -> None:
        self._comm, self._length, self._at = comm, length, places
        self._memory = BufferPool()
        self._change = threading.Condition()
        # Guarded by `_change`: chunks to start, and the number of unfinished ones.
        self._queue: deque[Iterator[Requests]] = deque()
        self._open, self._since = 0, 0.0
        self._awaited = self._stopped = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._number = self._given = 0
        self._terms: list[np.ndarray] = []
        self._out = self._own_place = np.empty(0, np.float32)
        self.begun = False

    def begin(self, terms: list[np.ndarray]) -> None:
        """As in `Overlapped`."""
        if self._stopped:
            raise RuntimeError("this rank has failed in an earlier step, and cannot go on with the others")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tf_dist-overlap", daemon=True)
            self._thread.start()
        if self._at.window is not None:
            assert self._at.window.holds(terms), "these terms do not lie in the window"
            self._terms, self._out = self._at.window.everyones()
        else:
            if not terms and not self._own_place.size:
                self._own_place = np.empty(self._length, np.float32)
            self._terms, self._out = terms, terms[0] if terms else self._own_place
        self._given, self.begun, self._awaited = 0, True, False

    def has(self, terms: list[np.ndarray]) -> bool:
        """Whether these are the terms of the current sum."""
        if not self.begun:
            return False
        if self._at.window is not None:
            return self._at.window.holds(terms)
        return all(one is other for one, other in zip(terms, self._terms, strict=True))

    def ready(self, part: slice) -> None:
        """As in `Overlapped`."""
        self._given += part.stop - part.start
        # Same sizes on all ranks of a node: they must produce the same chunks.
        elements = min(self._comm.chunk_bytes // 4, large_counts.MOST) * self._at.node.Get_size()
        for piece in pieces(part.stop - part.start, elements):
            moved = slice(part.start + piece.start, part.start + piece.stop)
            self._count(moved)
            self._submit(self._sum_of(moved, self._number))
            self._number += 1

    def finish(self) -> Reduced:
        """Wait for the current sum.

        Returns:
            The sum: in the first of this rank's terms, or in memory of the window or of this exchange.
        """
        assert self._given == self._length, "a part of the sum was never ready"
        begun = time.monotonic()
        self._awaited = True
        self._wait_for_all()
        if self._at.window is not None:
            self._submit(self._last())
            self._wait_for_all()
            self._at.window.turn()
        self.begun = False
        self._comm.overlapped_sums += 1
        self._comm.exposed_s += time.monotonic() - begun
        return Reduced(self._out)

    def _wait_for_all(self) -> None:
        with self._change:
            self._change.wait_for(lambda: not self._open or self._error is not None)
        if self._error is not None:
            raise self._error

    def give_up(self) -> None:
        """As in `Overlapped`."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join(STOP_S)

    # What is exchanged -----------------------------------------------------------------------------

    def _own(self, piece: slice) -> slice:
        """The elements of a chunk that this rank adds for its node."""
        node = self._at.node
        part = slices(piece.stop - piece.start, node.Get_size())[node.Get_rank()]
        return slice(piece.start + part.start, piece.start + part.stop)

    def _count(self, piece: slice) -> None:
        """Count the bytes of a chunk; not in the thread, as the main thread counts as well."""
        mine, between = self._own(piece), self._at.between
        left, length = len(self._at.share.left), mine.stop - mine.start
        sent = sent_elements(length, left, between.Get_rank(), between.Get_size())
        self._comm.record.sent_bytes += self._out.itemsize * sent

    def _sum_of(self, piece: slice, number: int) -> Iterator[Requests]:
        """Reduce a chunk within the node, then across nodes."""
        node, share = self._at.node, self._at.share
        if node.Get_size() > 1:
            yield [node.Ibarrier()]  # all ranks of the node have this chunk of their terms ready
        mine = self._own(piece)
        values = [term[mine] for term in self._terms]
        if share.additions:
            add_in_order(values, share.additions)
        left = [values[term] for term in share.left]
        yield from allreduce_chunk(
            self._at.between, left, self._at.rest, self._out[mine], number, self._memory
        )

    def _last(self) -> Iterator[Requests]:
        yield [self._at.node.Ibarrier()]  # all ranks of the node have written their slices

    def _submit(self, work: Iterator[Requests]) -> None:
        with self._change:
            if not self._open:
                self._since = time.monotonic()
            self._queue.append(work)
            self._open += 1
            self._change.notify_all()

    # The thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._exchange()
        except BaseException as error:  # re-raised in `finish`
            with self._change:
                self._error = error
                self._change.notify_all()

    def _wait_for_work(self) -> bool:
        with self._change:
            self._change.wait_for(lambda: self._queue or self._stopped)
            return not self._stopped

    def _exchange(self) -> None:
        """Progress chunks until none is left."""
        under_way: list[tuple[Iterator[Requests], Requests]] = []
        while not self._stopped:
            under_way += self._begin_more(DEPTH - len(under_way))
            if not under_way:
                return
            moved = False
            for at in reversed(range(len(under_way))):
                work, requests = under_way[at]
                if MPI.Request.Testall(requests):
                    moved = True
                    under_way[at : at + 1] = self._go_on(work)
            if not moved:
                time.sleep(0.0 if self._awaited else LOOK_EVERY_S)

    def _begin_more(self, count: int) -> list[tuple[Iterator[Requests], Requests]]:
        begun: list[tuple[Iterator[Requests], Requests]] = []
        while self._queue and len(begun) < count:
            work = self._queue.popleft()
            begun.append((work, next(work)))
        return begun

    def _go_on(self, work: Iterator[Requests]) -> list[tuple[Iterator[Requests], Requests]]:
        """The work and its next requests; empty if it has finished."""
        requests = next(work, None)
        if requests is not None:
            return [(work, requests)]
        with self._change:
            self._open -= 1
            if not self._open:
                self._comm.under_way_s += time.monotonic() - self._since
            self._change.notify_all()
        return []
