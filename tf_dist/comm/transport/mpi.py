"""`MPIComm`: the verbs of `Comm`, implemented by mpi4py's buffer methods.

Only the upper-case methods are used: they move bytes. The lower-case ones pickle, which is slow and
would let any process that joins the job run code here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from tf_dist.comm.formatting import named
from tf_dist.comm.transport import large_counts, ulfm
from tf_dist.comm.transport.base import AGREEMENT, WINDOW, Comm, Overlapped, Pending
from tf_dist.comm.transport.overlapped_allreduce import OverlappedAllreduce, TermLayout
from tf_dist.comm.transport.pipelined_allreduce import BufferPool, allreduce_in_chunks, sent_elements
from tf_dist.comm.transport.reduction_order import Reduced, ReductionOrder, add_in_order
from tf_dist.comm.transport.shared_memory import Between, NodeShare, SharedWindow, by_node, shortage
from tf_dist.errors import OrderError, RankLost

# Large messages in chunks stay in the cache between the ranks of a node: 64 MiB takes 31 ms as one
# Allreduce of Open MPI 5 and 7 ms in chunks of 2 MiB. Also keeps counts far below MPI's int limit. The chunk
# size for sums of terms is tuned separately, where it matters (`Comm.chunk_bytes`).
CHUNK_BYTES = 2 << 20
# Tag of point-to-point messages; the all-reduce of terms uses tags from 0 on.
MESSAGE_TAG = 32_000


class MPIComm(Comm):
    """The ranks of an MPI communicator.

    Args:
        communicator: duplicated, so that messages cannot be mixed up with others; COMM_WORLD if None.
        window: whether ranks of one node reduce in shared memory; False: always by messages.
        node: the ranks that share memory, if MPI is not to be asked.
    """

    def __init__(
        self,
        communicator: MPI.Intracomm | None = None,
        window: bool = True,
        node: MPI.Intracomm | None = None,
    ) -> None:
        super().__init__()
        self._window_wanted = window
        self._join((communicator or MPI.COMM_WORLD).Dup(), node)
        self.origin = list(range(self.size))

    def _join(self, mpi: Any, node: Any = None) -> None:
        """Attach to a communicator, and drop all state of an earlier one; a collective of its ranks."""
        self._mpi, self.rank, self.size = mpi, mpi.Get_rank(), mpi.Get_size()
        self._memory, self._across = BufferPool(), None
        # Derived communicators, in which ranks may wait for each other: revoked with this one (`_call_back`).
        self._made: list[Any] = []
        self._groups: list[MPIComm] = []
        self._windows: dict[tuple[int, ReductionOrder], SharedWindow] = {}
        self._overlaps: dict[tuple[int, ReductionOrder], dict[SharedWindow | None, OverlappedAllreduce]] = {}
        # A collective that excluded a failed rank may have left messages, which the next one would receive.
        self._apart = self._remembered(mpi.Dup())
        self._node: Any = node
        if node is None and self._window_wanted:
            self._node = self._remembered(mpi.Split_type(MPI.COMM_TYPE_SHARED))

    def _remembered(self, mpi: Any) -> Any:
        self._made.append(mpi)
        return mpi

    @property
    def survives(self) -> bool:
        """As in `Comm`; not in debug mode, which has a communicator of its own for all ranks."""
        return ulfm.can() and not self.watched

    def regroup(self, fine: bool = True, at: str = AGREEMENT) -> list[int] | None:
        """As in `Comm`."""
        if not self.survives:
            return None
        if not fine:
            self._call_back()
        lost: list[int] | None = None
        self.record.waiting = (at, time.monotonic())
        while not ulfm.agree(self._mpi, fine):
            mpi, gone = ulfm.shrink(self._mpi)
            lost = (lost or []) + [self.origin[rank] for rank in gone]
            self.origin = [first for rank, first in enumerate(self.origin) if rank not in gone]
            fine = self._rejoin(mpi)
        self.record.waiting = None
        if lost is not None:
            self.calls = 0  # ranks may have begun different numbers of collectives
        return lost

    def _call_back(self) -> None:
        """Revoke this rank's communicators, so that operations of other ranks in them raise an error."""
        for mpi in (self._mpi, *self._made):
            mpi.Revoke()
        for group in self._groups:
            group._call_back()

    def _rejoin(self, mpi: Any) -> bool:
        """Attach to the surviving ranks; False if a rank failed meanwhile."""
        try:
            self._join(mpi)
        except MPI.Exception as error:
            if not ulfm.is_loss(error, mpi):
                raise
            mpi.Revoke()
            return False
        return True

    def understood(self, error: BaseException) -> BaseException:
        """As in `Comm`."""
        if not self.survives:
            return _out_of_order(error)
        if not ulfm.is_loss(error, self._mpi):
            return error
        ranks = [self.origin[rank] for rank in ulfm.dead(self._mpi)]
        who = f"{named(ranks)} ha{'s' if len(ranks) == 1 else 've'} died" if ranks else "a rank has died"
        return RankLost(who, ranks)

    def term_buffers(self, length: int, order: ReductionOrder) -> Callable[[], list[np.ndarray]] | None:
        """As in `Comm`, in shared memory of the node, if that is large enough; a collective."""
        reason = "" if (length, order) in self._windows else self._open_window(length, order)
        self.carried_by = f"messages: {reason}" if reason else WINDOW
        return None if reason else self._windows[length, order].buffers

    def forget_buffers(self, length: int, order: ReductionOrder) -> None:
        """As in `Comm`. The memory stays: another rank may still read it."""
        super().forget_buffers(length, order)
        self._windows.pop((length, order), None)

    def nodes(self) -> int:
        """As in `Comm`."""
        own: Any = self._node or self._mpi.Split_type(MPI.COMM_TYPE_SHARED)
        return sum(self.allgather_obj(int(own.Get_rank() == 0)))

    def overlapped(self, length: int, order: ReductionOrder, shared: bool = True) -> Overlapped | None:
        """As in `Comm`; with a window, the ranks of a node first synchronize on each chunk."""
        self.no_overlap_because = ""
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            self.no_overlap_because = "this MPI lets one thread alone talk"
        self.no_overlap_because = max(self.allgather_obj(self.no_overlap_because))
        if self.no_overlap_because:
            return None
        # One per memory layout of the terms: a window, or each rank's own memory.
        known = self._overlaps.setdefault((length, order), {})
        window = self._windows.get((length, order)) if shared else None
        if window not in known:
            known[window] = OverlappedAllreduce(self, length, self._places_of_terms(window, order))
        return known[window]

    def _places_of_terms(self, window: SharedWindow | None, order: ReductionOrder) -> TermLayout:
        if window is None:
            count = order.counts[self.rank]
            share = NodeShare((count,), (), tuple(range(count)))
            return TermLayout(None, MPI.COMM_SELF, self._remembered(self._mpi.Dup()), share, order)
        share, rest = self._shares(order, self._places())
        node, across = self._remembered(self._node.Dup()), self._remembered(self._same_slice().Dup())
        return TermLayout(window, node, across, share, rest)

    def _shares(self, order: ReductionOrder, places: list[list[int]]) -> tuple[NodeShare, ReductionOrder]:
        """The additions of this rank's node, and the remaining ones."""
        shares, rest = by_node(order, places)
        return shares[next(number for number, ranks in enumerate(places) if self.rank in ranks)], rest

    def _open_window(self, length: int, order: ReductionOrder) -> str:
        """Create the window; returns the reason if there is none, the same on all ranks."""
        if self._node is None:
            return "no window was wanted"
        places = self._places()
        if len({len(ranks) for ranks in places}) > 1:
            return "nodes have different numbers of ranks"
        if len(places) > 1 and not order.counts[0]:
            return "rank 0 has nothing to add"
        share, rest = self._shares(order, places)
        window, reason = None, max(self.allgather_obj(shortage(length, share)))
        if not reason:
            try:
                window = SharedWindow(
                    self._node, length, share, self._between(rest) if len(places) > 1 else None
                )
            except MPI.Exception as error:
                reason = str(error)
            reason = max(self.allgather_obj(reason))
        if window is not None and not reason:
            self._windows[length, order] = window
        return str(reason)

    def _places(self) -> list[list[int]]:
        """The ranks of each node, ascending; nodes by their first ranks."""
        leaders = self.allgather_obj(self._first_of_node())
        nodes = sorted(set(leaders))
        return [[rank for rank, leader in enumerate(leaders) if leader == node] for node in nodes]

    def _between(self, rest: ReductionOrder) -> Between:
        """Sums over the ranks that own the same slice on other nodes; each node counts as a rank."""
        mpi, memory = self._same_slice(), BufferPool()

        def add(terms: list[np.ndarray], out: np.ndarray) -> None:
            sent = sent_elements(out.size, len(terms), mpi.Get_rank(), mpi.Get_size())
            self.record.sent_bytes += out.itemsize * sent
            allreduce_in_chunks(mpi, terms, rest, out, self._chunk_elements(out), memory)

        return add

    def _same_slice(self) -> Any:
        """The ranks that own the same slice, one of each node."""
        if self._across is None:
            self._across = self._remembered(self._mpi.Split(self._node.rank, self._first_of_node()))
        return self._across

    def _first_of_node(self) -> int:
        first = np.array([self.rank], np.int64)
        self._node.Bcast(first)
        return int(first[0])

    def _isend(self, array: np.ndarray, to: int, tag: int) -> Pending:
        return large_counts.isend(self._mpi, array, to, MESSAGE_TAG + tag)

    def _irecv(self, array: np.ndarray, source: int, tag: int) -> Pending:
        return large_counts.irecv(self._mpi, array, source, MESSAGE_TAG + tag)

    def _sub(self, shape: Sequence[int], axes: Sequence[int]) -> Comm:
        # reorder=False: ranks keep their numbers, so that the innermost axis has adjacent ranks.
        grid = self._mpi.Create_cart(list(shape), reorder=False)
        part = grid.Sub([axis in axes for axis in range(len(shape))])
        self._groups.append(MPIComm(part, window=self._node is not None))
        ranks = MPI.Group.Translate_ranks(part.Get_group(), None, self._mpi.Get_group())
        self._groups[-1].origin = [self.origin[rank] for rank in ranks]
        return self._groups[-1]

    def _first(self, count: int) -> Comm | None:
        here = self._mpi.Split(0 if self.rank < count else MPI.UNDEFINED, self.rank)
        if here == MPI.COMM_NULL:
            return None
        self._groups.append(MPIComm(here, window=self._node is not None))
        self._groups[-1].origin = self.origin[:count]
        return self._groups[-1]

    def _allreduce(self, array: np.ndarray) -> None:
        self.record.sent_bytes += 2 * array.nbytes * (self.size - 1) // self.size
        for part in _chunks(array):
            self._mpi.Allreduce(MPI.IN_PLACE, part, op=MPI.SUM)

    def _broadcast(self, array: np.ndarray, root: int) -> None:
        # Every other rank receives it once, from some rank: counted as sent by the root.
        self.record.sent_bytes += array.nbytes * (self.size - 1) * (self.rank == root)
        for part in _chunks(array):
            self._mpi.Bcast(part, root=root)

    def _allgather(self, array: np.ndarray, parts: Sequence[slice]) -> None:
        if any(window.covers(array) for window in self._windows.values()) and self._node.size == self.size:
            self._node.Barrier()  # one shared array, of which each rank has written its part
            return
        own = parts[self.rank]
        self.record.sent_bytes += (own.stop - own.start) * array.itemsize * (self.size - 1)
        large_counts.allgather(self._mpi, array, parts)

    def _gather(self, array: np.ndarray, root: int) -> np.ndarray | None:
        rows = np.empty((self.size, array.size), array.dtype) if self.rank == root else None
        self.record.sent_bytes += array.nbytes * (self.rank != root)
        large_counts.gather(self._mpi, array, rows, root)
        return rows

    def _allreduce_terms(self, terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray) -> Reduced:
        for overlap in self._overlaps.get((out.size, order), {}).values():
            if overlap.has(terms):
                return overlap.finish()
        window = self._window_for(out.size, order, out.dtype)
        if window is None:
            self._allreduce_by_messages(terms, order, out)
            return Reduced(out)
        ours = window.holds(terms)
        found = window.sum(terms)
        if not ours:
            np.copyto(out, found.array)
        return Reduced(found.array if ours else out, found.squares)

    def _window_for(self, length: int, order: ReductionOrder, dtype: np.dtype) -> SharedWindow | None:
        return self._windows.get((length, order)) if dtype == np.float32 else None

    def _reduce_scatter_terms(
        self, terms: list[np.ndarray], order: ReductionOrder, parts: Sequence[slice], out: np.ndarray
    ) -> None:
        length = parts[-1].stop
        window = self._window_for(length, order, out.dtype)
        if window is not None:  # all ranks can read the full sum, and nothing was sent
            np.copyto(out, window.sum(terms).array[parts[self.rank]])
        else:
            self._reduce_slices(terms, order, parts, out)

    def _allreduce_by_messages(self, terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray) -> None:
        elements = self._chunk_elements(out)
        self.record.sent_bytes += out.itemsize * sent_elements(out.size, len(terms), self.rank, self.size)
        allreduce_in_chunks(self._mpi, terms, order, out, elements, self._memory)

    def _chunk_elements(self, array: np.ndarray) -> int:
        return min(max(1, self.chunk_bytes // array.itemsize), large_counts.MOST)

    def _reduce_terms(
        self, terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray, root: int
    ) -> Reduced | None:
        if self._window_for(out.size, order, out.dtype) is not None:  # all ranks add: faster than the root
            found = self._allreduce_terms(terms, order, out if self.rank == root else np.empty_like(out))
            return found if self.rank == root else None
        whole, nothing = slice(0, out.size), slice(0, 0)
        parts = [whole if r == root else nothing for r in range(self.size)]
        self._reduce_slices(terms, order, parts, out[parts[self.rank]])
        return Reduced(out) if self.rank == root else None

    def _reduce_slices(
        self, terms: list[np.ndarray], order: ReductionOrder, parts: Sequence[slice], out: np.ndarray
    ) -> None:
        """Let rank r add the elements ``parts[r]`` of all terms into ``out``, which has that length."""
        done = 0
        for pieces in large_counts.slices_of(parts):
            length = pieces[self.rank].stop - pieces[self.rank].start
            self._reduce_chunks(terms, order, pieces, out[done : done + length])
            done += length

    def _reduce_chunks(
        self, terms: list[np.ndarray], order: ReductionOrder, parts: Sequence[slice], out: np.ndarray
    ) -> None:
        """`_reduce_slices` for a number of elements that MPI can count."""
        mine = parts[self.rank]
        received: list[np.ndarray] = []
        values, requests = [], []
        for source, count in enumerate(order.counts):
            for number in range(count):
                if source == self.rank:
                    values.append(terms[number][mine])
                    continue
                values.append(self._memory.take(mine.stop - mine.start, out.dtype))
                received.append(values[-1])
                if values[-1].size:
                    requests.append(self._mpi.Irecv(values[-1], source, number))
        for other, part in enumerate(parts):
            if other != self.rank and part.stop > part.start:
                self.record.sent_bytes += len(terms) * (part.stop - part.start) * out.itemsize
                requests += [self._mpi.Isend(term[part], other, number) for number, term in enumerate(terms)]
        MPI.Request.Waitall(requests)
        if mine.stop > mine.start:
            np.copyto(out, add_in_order(values, order.additions))
        self._memory.give_back(received)

    def _barrier(self) -> None:
        self._mpi.Barrier()

    def _allgather_bytes(self, raw: bytes) -> list[bytes]:
        counts = self._from_all(self._mpi, len(raw))
        everything = np.zeros(int(counts.sum()), np.uint8)  # truncated by a failure, zeros are not JSON
        ends = np.cumsum(counts).tolist()
        parts = [slice(end - count, end) for end, count in zip(ends, counts.tolist(), strict=True)]
        everything[parts[self.rank]] = np.frombuffer(raw, np.uint8)
        large_counts.allgather(self._mpi, everything, parts)
        return [everything[part].tobytes() for part in parts]

    def _allgather_calls(self, calls: int) -> list[int]:
        return [int(one) for one in self._from_all(self._apart, calls)]

    def _from_all(self, mpi: Any, count: int) -> np.ndarray:
        """All-gather a count.

        Raises:
            RankLost: a rank has failed without an MPI error, and the collective was truncated.
        """
        counts = np.full(self.size, -1, np.int64)
        mpi.Allgather(np.array([count], np.int64), counts)
        if self.survives and counts.min() < 0:
            raise RankLost("a rank has died")
        return counts


def _out_of_order(error: BaseException) -> BaseException:
    """`OrderError` if a message of another length has arrived; other errors unchanged."""
    if not isinstance(error, MPI.Exception) or error.Get_error_class() != MPI.ERR_TRUNCATE:
        return error
    return OrderError(
        "a message of another length than was expected has arrived: the ranks are in different collectives, "
        "or call one with arrays of different lengths. TF_DIST_DEBUG=1 finds the line"
    )


def _chunks(array: np.ndarray) -> list[np.ndarray]:
    return large_counts.chunks(array, max(1, CHUNK_BYTES // array.itemsize))
