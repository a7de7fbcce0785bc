"""`Comm`: a rank, a size, and MPI's verbs on flat NumPy arrays.

All other packages are written against these verbs. `SerialComm` is the null object: one
rank for which every collective is already complete, so that no caller needs ``if size > 1``.

Legend: R ranks.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Protocol

import numpy as np

from tf_dist.comm import control_messages
from tf_dist.comm.timers import CommTimers
from tf_dist.comm.transport.reduction_order import Reduced, ReductionOrder, add_in_order
from tf_dist.errors import LaunchError, RankLost, UsageError

# `Comm.carried_by` if sums are made in shared memory.
WINDOW = "a shared window"
# Label shown while a rank waits in `Comm.regroup`.
AGREEMENT = "an agreement of all ranks"
# By default terms are reduced in one chunk (up to MPI's count limit): on one node each chunk costs a barrier.
# Between nodes smaller chunks are faster: see `tf_dist.parallel.transport_tuning`.
DEFAULT_CHUNK_BYTES = 1 << 30
# Tags of point-to-point messages: MPI guarantees 32,768 of them, and other messages use the first 32,000.
TAGS = 768


class Overlapped(ABC):
    """An all-reduce of terms in parts, overlapped with the computation of later parts.

    On all ranks alike: `begin`, then `ready` with parts that together cover everything, in one common order;
    then `Comm.allreduce_terms` with these terms waits for the sum, and returns it.

    Attributes:
        begun: whether a sum has begun and its result was not collected yet: no other one may begin.
    """

    begun: bool

    @abstractmethod
    def begin(self, terms: list[np.ndarray]) -> None:
        """Begin a sum. Its terms are stored here; no element of them is final yet."""

    @abstractmethod
    def ready(self, part: slice) -> None:
        """Declare elements of this rank's terms final; from now on they belong to the Comm."""

    @abstractmethod
    def give_up(self) -> None:
        """Abandon the exchange, as this rank has failed, and touch no term again."""


class Pending(Protocol):
    """A message in flight. Its array belongs to the Comm until `wait` has returned."""

    def wait(self) -> None:
        """Return once the array may be reused."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""


class Comm(ABC):
    """A group of communicating ranks.

    Every verb except the point-to-point ones is a collective: all ranks call the same verbs in the same
    order, with arrays of one length and dtype. Arrays are contiguous, one-dimensional, and changed in place.

    Attributes:
        rank: this process, 0 <= rank < size.
        size: number of ranks, R.
        record: shared with the Comms of a `grid`; the next four are read from it.
        comm_s: seconds spent moving and reducing arrays so far.
        wait_s: seconds spent in `barrier`, waiting for slower ranks.
        sent_bytes: bytes that this rank has sent in messages. For MPI's own collectives, whose algorithm is
            not known, the bytes of the best algorithm; data in a shared window is not sent.
        overlapped_sums: number of overlapped sums; under_way_s: seconds during which they were in flight;
        exposed_s: those of them spent waiting, which are also in ``comm_s``.
        waiting: the verb this rank is inside of and when it entered it (`time.monotonic`), or None. Shared.
        calls: collectives begun so far.
        origin: where ranks may fail (`survives`): the rank of each in the original job.
        keeps_order: whether sums of terms are made in the requested order.
        chunk_bytes: size of the chunks of messages that carry terms, the same on every rank.
        no_overlap_because: why `overlapped` returned None.
        carried_by: how terms are summed since the last `term_buffers`: `WINDOW`, or "messages" and why.
        before: hook called with verb, array (or None) and root at the start of every collective; a no-op
            unless `collective_order.keep_order` has installed its comparison.
    """

    rank: int
    size: int
    keeps_order = True

    def __init__(self) -> None:
        self.record = CommTimers()
        self.overlapped_sums, self.under_way_s, self.exposed_s = 0, 0.0, 0.0
        self.chunk_bytes = DEFAULT_CHUNK_BYTES
        self.no_overlap_because = "this backend cannot"
        self.calls = 0
        self.origin: list[int] = []
        self.carried_by = "messages"
        self.before: Callable[[str, np.ndarray | None, int], None] = _nothing

    @property
    def comm_s(self) -> float:
        """Seconds spent moving and reducing arrays so far."""
        return self.record.comm_s

    @property
    def wait_s(self) -> float:
        """Seconds spent in `barrier` so far."""
        return self.record.wait_s

    @property
    def sent_bytes(self) -> int:
        """Bytes given to other ranks so far."""
        return self.record.sent_bytes

    @property
    def waiting(self) -> tuple[str, float] | None:
        """The verb this rank is inside of, and since when."""
        return self.record.waiting

    @property
    def watched(self) -> bool:
        """Whether a hook inspects every collective before it starts."""
        return self.before is not _nothing

    # The verbs ---------------------------------------------------------------------------------

    def allreduce(self, array: np.ndarray) -> None:
        """Replace ``array`` by its sum over all ranks, on every rank."""
        with self._collective("allreduce", array):
            self._allreduce(_flat(array))

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """Replace ``array`` by that of ``root``, on every rank."""
        with self._collective("broadcast", array, root):
            self._broadcast(_flat(array), root)

    def gather(self, array: np.ndarray, root: int = 0) -> np.ndarray | None:
        """Return the arrays of all ranks as (R, n) on ``root``, and None elsewhere."""
        with self._collective("gather", array, root):
            return self._gather(_flat(array), root)

    def term_buffers(self, length: int, order: ReductionOrder) -> Callable[[], list[np.ndarray]] | None:
        """Allocate memory from which `allreduce_terms` sums without a copy; a collective.

        Args:
            length: float32 elements of each term.
            order: of the sums to come.

        Returns:
            A function that returns the buffers for this rank's terms of the next sum; None: any array is as
            good.
        """
        return None

    def forget_buffers(self, length: int, order: ReductionOrder) -> None:
        """Sum such terms as if `term_buffers` had never been called; on all ranks."""
        self.carried_by = "messages"

    def nodes(self) -> int:
        """Number of groups of ranks that share memory, as far as this Comm knows; a collective."""
        return 1

    def overlapped(self, length: int, order: ReductionOrder, shared: bool = True) -> Overlapped | None:
        """Prepare an overlapped all-reduce of such terms, in parts, as they become ready; a collective.

        Call it after `term_buffers`. The bits are those of `allreduce_terms`.

        Args:
            length: elements of each term.
            order: of the sums to come.
            shared: terms will be in the buffers of `term_buffers`, if it was called; False: anywhere.

        Returns:
            None if this Comm, or this MPI, does not support it; ``no_overlap_because`` says why.
        """
        return None

    def allreduce_terms(self, terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray) -> Reduced:
        """All-reduce terms in the given order.

        Unlike `allreduce`, whose order is the transport's, this gives the same bits for every number of ranks
        among which the terms of one tree are distributed (`tf_dist.parallel.reduction_tree`). Horovod cannot:
        its result differs in the last bits.

        Args:
            terms: this rank's, each of the length of ``out``; their content is lost.
            order: the same on every rank.
            out: receives the sum; may be one of the terms.

        Returns:
            The sum, in ``out``; or in memory of the Comm, valid until the next sum, if the terms were its
            `term_buffers`.
        """
        with self._collective("allreduce_terms", out):
            return self._allreduce_terms([_flat(term) for term in terms], order, _flat(out))

    def reduce_terms(
        self, terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray, root: int = 0
    ) -> Reduced | None:
        """Reduce terms to ``root``, as `allreduce_terms`; ``out`` of the others is unchanged."""
        with self._collective("reduce_terms", out, root):
            return self._reduce_terms([_flat(term) for term in terms], order, _flat(out), root)

    def reduce_scatter_terms(
        self, terms: list[np.ndarray], order: ReductionOrder, parts: Sequence[slice], out: np.ndarray
    ) -> None:
        """Reduce-scatter terms, as `allreduce_terms`: rank r gets the elements ``parts[r]`` of the sum.

        Args:
            terms: this rank's, of one length; their content is lost.
            order: the same on every rank.
            parts: of all ranks, the same on every rank.
            out: receives this rank's elements of the sum.
        """
        with self._collective("reduce_scatter_terms", out):
            self._reduce_scatter_terms([_flat(term) for term in terms], order, parts, _flat(out))

    def allgather(self, array: np.ndarray, parts: Sequence[slice]) -> None:
        """All-gather ``array`` in place: rank r contributes the elements ``parts[r]``.

        Args:
            array: of all elements, of which this rank has set its own. One in memory that all ranks share,
                such as the result of `allreduce_terms`, costs a barrier.
            parts: of all ranks, the same on every rank: contiguous, in rank order, together everything.
        """
        with self._collective("allgather", array):
            self._allgather(_flat(array), parts)

    def barrier(self) -> None:
        """Return once every rank has arrived; the time counts as ``wait_s``."""
        with self._collective("barrier"):
            self._barrier()

    def allgather_obj(self, value: Any, *, what: str = "") -> list[Any]:
        """Return the JSON values of all ranks, in rank order.

        Args:
            value: of this rank, 64 MiB at most.
            what: its purpose, which is sent along; empty: the name of the calling function.

        Raises:
            LaunchError: on every rank, naming what each is doing: a rank has called something else.
        """
        return self._exchanged(value, control_messages.purpose("allgather_obj", what))

    def broadcast_obj(self, value: Any, root: int = 0, *, what: str = "") -> Any:
        """Return the JSON value of ``root``; the others' values are ignored. Otherwise as `allgather_obj`."""
        mine = value if self.rank == root else None
        return self._exchanged(mine, control_messages.purpose(f"broadcast_obj of rank {root}", what))[root]

    def _exchanged(self, value: Any, purpose: control_messages.Purpose) -> list[Any]:
        raw = control_messages.encode(value, purpose)
        with self._collective("allgather_obj"):
            try:
                return control_messages.decode(self._allgather_bytes(raw), purpose)
            except LaunchError:
                raise
            except (ValueError, MemoryError, OverflowError) as error:
                if self.survives:  # Truncated without an MPI error: seen once in some 400 failures.
                    raise RankLost("a rank has died") from error
                raise LaunchError(control_messages.foreign(purpose)) from error

    def calls_of_all(self) -> list[int]:
        """Return ``calls`` of all ranks, in rank order; unaffected by stray messages."""
        calls = self.calls
        with self._collective("calls_of_all"):
            return self._allgather_calls(calls)

    # Point to point --------------------------------------------------------------------------------

    def isend(self, array: np.ndarray, to: int, tag: int = 0) -> Pending:
        """Start a send; messages with one tag to one rank arrive in the order in which they were sent.

        Args:
            array: contiguous and one-dimensional.
            to: destination rank.
            tag: 0 to `TAGS` - 1; the receive uses the same one.
        """
        self.record.sent_bytes += array.nbytes
        with self._errors_as_ours():
            return _Timed(self._isend(_flat(array), to, tag), self, f"send to rank {to}")

    def irecv(self, array: np.ndarray, source: int, tag: int = 0) -> Pending:
        """Start a receive, into an array of the length and dtype of the message with this tag."""
        with self._errors_as_ours():
            return _Timed(self._irecv(_flat(array), source, tag), self, f"receive from rank {source}")

    # Rank failures -------------------------------------------------------------------------------

    @property
    def survives(self) -> bool:
        """Whether a failed rank raises an error, `RankLost`, on the others instead of ending them."""
        return False

    def regroup(self, fine: bool = True, at: str = AGREEMENT) -> list[int] | None:
        """Agree with all surviving ranks that no rank failed, else continue as a smaller group; a collective.

        The survivors keep their order: the first of them is rank 0. Shared memory is abandoned, and messages
        in flight are lost. Comms made by `grid` before become invalid, except for this one.

        Args:
            fine: whether this rank has seen no `RankLost` since the last time.
            at: label shown for a rank that waits here.

        Returns:
            None if no rank failed; else the ranks that have failed since, by `origin`.
        """
        return None

    # Smaller groups ------------------------------------------------------------------------------

    def grid(self, shape: Sequence[int], axes: Sequence[Sequence[int]]) -> list[Comm]:
        """Arrange the ranks as a grid, the last axis innermost, and make Comms along its axes; a collective.

        Args:
            shape: of the grid; its product is the number of ranks.
            axes: for each Comm, the axes along which its ranks differ.

        Returns:
            For each, the ranks that differ from this one along these axes only, in the grid's order; this
            Comm itself if these are all ranks. They share this one's `record`.
        """
        assert prod(shape) == self.size, f"a grid of {shape} does not have {self.size} ranks"
        made: list[Comm] = []
        for wanted in axes:
            size = prod(shape[axis] for axis in wanted)
            made.append(
                self if size == self.size else SerialComm() if size == 1 else self._sub(shape, wanted)
            )
            made[-1].record = self.record
        return made

    def first(self, count: int) -> Comm | None:
        """The first ``count`` ranks as a Comm with this one's `record`, None on the others; a collective."""
        if count == self.size:
            return self
        part = self._first(count)
        if part is not None:
            part.record = self.record
        return part

    # Implemented by transports -------------------------------------------------------------------

    def _first(self, count: int) -> Comm | None:
        raise self._cannot("be divided")

    def _isend(self, array: np.ndarray, to: int, tag: int) -> Pending:
        raise self._cannot("send to a single rank")

    def _irecv(self, array: np.ndarray, source: int, tag: int) -> Pending:
        raise self._cannot("receive from a single rank")

    def _reduce_scatter_terms(
        self, terms: list[np.ndarray], order: ReductionOrder, parts: Sequence[slice], out: np.ndarray
    ) -> None:
        raise self._cannot("give each rank a part of a sum")

    def _allgather(self, array: np.ndarray, parts: Sequence[slice]) -> None:
        raise self._cannot("gather parts")

    def _sub(self, shape: Sequence[int], axes: Sequence[int]) -> Comm:
        raise self._cannot("make groups of ranks")

    def _cannot(self, what: str) -> Exception:
        return UsageError(f"{type(self).__name__} cannot {what}: this needs --backend mpi")

    @abstractmethod
    def _allreduce(self, array: np.ndarray) -> None: ...

    @abstractmethod
    def _broadcast(self, array: np.ndarray, root: int) -> None: ...

    @abstractmethod
    def _gather(self, array: np.ndarray, root: int) -> np.ndarray | None: ...

    @abstractmethod
    def _allreduce_terms(
        self, terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray
    ) -> Reduced: ...

    @abstractmethod
    def _reduce_terms(
        self, terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray, root: int
    ) -> Reduced | None: ...

    @abstractmethod
    def _barrier(self) -> None: ...

    @abstractmethod
    def _allgather_bytes(self, raw: bytes) -> list[bytes]: ...

    def _allgather_calls(self, calls: int) -> list[int]:
        return [int(raw) for raw in self._allgather_bytes(str(calls).encode())]

    def understood(self, error: BaseException) -> BaseException:
        """Convert an error of the transport to one of `tf_dist.errors`, if it has an equivalent."""
        return error

    @contextmanager
    def _errors_as_ours(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            understood = self.understood(error)
            if understood is error:
                raise
            raise understood from error

    @contextmanager
    def _collective(self, verb: str, array: np.ndarray | None = None, root: int = 0) -> Iterator[None]:
        begun = time.monotonic()
        self.calls += 1
        self.record.waiting = (verb, begun)
        self.before(verb, array, root)
        with self._errors_as_ours():
            yield
        # Not in a `finally`: a rank that failed inside a collective is still in it.
        self.record.waiting = None
        elapsed = time.monotonic() - begun
        if verb == "barrier":
            self.record.wait_s += elapsed
        else:
            self.record.comm_s += elapsed


class SerialComm(Comm):
    """One rank. Every sum is its own term; every broadcast is complete."""

    rank = 0
    size = 1

    def _allreduce(self, array: np.ndarray) -> None:
        pass

    def _broadcast(self, array: np.ndarray, root: int) -> None:
        pass

    def _gather(self, array: np.ndarray, root: int) -> np.ndarray | None:
        return array.reshape(1, -1)

    def _allreduce_terms(self, terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray) -> Reduced:
        total = add_in_order(terms, order.additions)
        if total is not out:
            np.copyto(out, total)
        return Reduced(out)

    def _reduce_terms(
        self, terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray, root: int
    ) -> Reduced | None:
        return self._allreduce_terms(terms, order, out)

    def _reduce_scatter_terms(
        self, terms: list[np.ndarray], order: ReductionOrder, parts: Sequence[slice], out: np.ndarray
    ) -> None:
        np.copyto(out, add_in_order(terms, order.additions)[parts[0]])

    def _allgather(self, array: np.ndarray, parts: Sequence[slice]) -> None:
        pass

    def _barrier(self) -> None:
        pass

    def _allgather_bytes(self, raw: bytes) -> list[bytes]:
        return [raw]


class _Timed:
    """A message whose wait counts as communication, and is visible to the watchdog."""

    def __init__(self, pending: Pending, comm: Comm, what: str) -> None:
        self._pending, self._comm, self._what = pending, comm, what

    def wait(self) -> None:
        begun, record = time.monotonic(), self._comm.record
        record.waiting = (self._what, begun)
        with self._comm._errors_as_ours():
            self._pending.wait()
        record.waiting = None
        record.comm_s += time.monotonic() - begun

    def done(self) -> bool:
        with self._comm._errors_as_ours():
            return self._pending.done()


def _nothing(verb: str, array: np.ndarray | None, root: int) -> None:
    pass


def _flat(array: np.ndarray) -> np.ndarray:
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(
            f"a collective takes a contiguous 1-D array, not shape {array.shape}; see parallel/flat_buffer.py"
        )
    return array
