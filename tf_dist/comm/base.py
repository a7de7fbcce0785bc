"""`Comm`: a rank, a size, and MPI's verbs on flat NumPy arrays.

Everything above this room is written against these few verbs. `SerialComm` is the null object: one
rank for whom every collective is already complete, so that no code above needs ``if size > 1``.

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

from tf_dist.comm import control
from tf_dist.comm.record import Record
from tf_dist.comm.sums import Order, Sum, add_in_order
from tf_dist.errors import LaunchError, RankLost, UsageError

# What `Comm.carried_by` says where sums are made in memory that ranks share.
WINDOW = "a shared window"
# Label shown while a rank waits in `Comm.regroup`.
AGREEMENT = "an agreement of all ranks"
# Sums of terms travel in one piece (of as much as MPI can count): on one node each piece costs a meeting of
# the ranks. Between nodes smaller ones are faster: see `tf_dist.parallel.carrier`.
DEFAULT_CHUNK_BYTES = 1 << 30
# Tags of messages between two ranks: MPI promises 32,768 of them, and other messages use the first 32,000.
TAGS = 768


class Overlapped(ABC):
    """A sum of terms that leaves in parts, while later ones are still being computed.

    On all ranks alike: `begin`, then `ready` with parts that together are everything, in one common order;
    then `Comm.allreduce_terms` with these terms waits for the sum, and returns it.

    Attributes:
        begun: whether a sum has begun and not yet been waited for: no other one may begin.
    """

    begun: bool

    @abstractmethod
    def begin(self, terms: list[np.ndarray]) -> None:
        """A sum begins. Its terms lie here, and no element of them is final yet."""

    @abstractmethod
    def ready(self, part: slice) -> None:
        """The elements of a part are final in all terms of this rank; they belong to the Comm from now on."""

    @abstractmethod
    def give_up(self) -> None:
        """Leave the exchange as it is, for this rank has failed, and touch no term again."""


class Pending(Protocol):
    """A message on its way. Its array belongs to the Comm until `wait` has returned."""

    def wait(self) -> None:
        """Return once the array may be used again."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""


class Comm(ABC):
    """A group of ranks that talk.

    Every verb but those between two ranks is a collective: all ranks call the same verbs in the same order,
    with arrays of one length and dtype. Arrays are contiguous, one-dimensional, and changed in place.

    Attributes:
        rank: this process, 0 <= rank < size.
        size: number of ranks, R.
        record: shared with the Comms of a `grid`; the next four are its.
        comm_s: seconds spent moving and reducing arrays so far.
        wait_s: seconds spent in `barrier`, waiting for slower ranks.
        sent_bytes: that this rank has given to others as messages. Of MPI's own collectives, which do not say
            how they do it, as many as the best algorithm sends; what lies in a shared window is not sent.
        overlapped_sums: how many sums left in parts; under_way_s: seconds during which they were under way;
        exposed_s: those of them that were waited for, which are also in ``comm_s``.
        waiting: the verb this rank is inside of and when it entered it (`time.monotonic`), or None. Shared.
        calls: collectives begun so far.
        origin: where ranks may die (`survives`): which rank each one was when the job began.
        chunk_bytes: sums of terms travel between ranks in pieces of this size, the same on every rank.
        no_overlap_because: why `overlapped` returned None.
        carried_by: how terms are summed since the last `term_buffers`: `WINDOW`, or "messages" and why.
        before: called with verb, array (or None) and root at the beginning of every collective; does
            nothing, unless `debug.keep_order` has put its comparison there.
    """

    rank: int
    size: int

    def __init__(self) -> None:
        self.record = Record()
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
        """Whether somebody looks at every collective before it begins."""
        return self.before is not _nothing

    # The verbs ---------------------------------------------------------------------------------

    def allreduce(self, array: np.ndarray) -> None:
        """Replace ``array`` by its sum over all ranks, everywhere."""
        with self._collective("allreduce", array):
            self._allreduce(_flat(array))

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """Replace ``array`` by that of ``root``, everywhere."""
        with self._collective("broadcast", array, root):
            self._broadcast(_flat(array), root)

    def gather(self, array: np.ndarray, root: int = 0) -> np.ndarray | None:
        """Return the arrays of all ranks as (R, n) on ``root``, and None elsewhere."""
        with self._collective("gather", array, root):
            return self._gather(_flat(array), root)

    def term_buffers(self, length: int, order: Order) -> Callable[[], list[np.ndarray]] | None:
        """Memory from which `allreduce_terms` sums without moving it first; a collective.

        Args:
            length: float32 elements of each term.
            order: of the sums to come.

        Returns:
            A function that says where this rank's terms of the next sum belong; None: any array is as good.
        """
        return None

    def forget_buffers(self, length: int, order: Order) -> None:
        """Sum such terms as if `term_buffers` had never been called; on all ranks."""
        self.carried_by = "messages"

    def nodes(self) -> int:
        """How many groups of ranks share memory, as far as this Comm knows; a collective."""
        return 1

    def overlapped(self, length: int, order: Order, shared: bool = True) -> Overlapped | None:
        """A way to sum such terms in parts, as they become ready; a collective.

        To be asked for after `term_buffers`. The bits are those of `allreduce_terms`.

        Args:
            length: elements of each term.
            order: of the sums to come.
            shared: terms will lie where `term_buffers` says, if it was asked; False: anywhere.

        Returns:
            None where this Comm, or this MPI, cannot; ``no_overlap_because`` says why.
        """
        return None

    def allreduce_terms(self, terms: list[np.ndarray], order: Order, out: np.ndarray) -> Sum:
        """Add the terms of all ranks, in the given order, everywhere.

        Unlike `allreduce`, whose order is the transport's, this gives the same bits for every number of
        ranks among which the terms of one tree are spread (`tf_dist.parallel.tree`). Horovod cannot: its
        result differs in the last bits.

        Args:
            terms: this rank's, each of the length of ``out``; their content is lost.
            order: the same on every rank.
            out: where the sum goes; may be one of the terms.

        Returns:
            The sum, in ``out``; in memory of the Comm's own, to be read before the next sum, where the
            terms were its `term_buffers`.
        """
        with self._collective("allreduce_terms", out):
            return self._allreduce_terms([_flat(term) for term in terms], order, _flat(out))

    def reduce_terms(
        self, terms: list[np.ndarray], order: Order, out: np.ndarray, root: int = 0
    ) -> Sum | None:
        """`allreduce_terms`, but only ``root`` gets the sum; ``out`` of the others is left alone."""
        with self._collective("reduce_terms", out, root):
            return self._reduce_terms([_flat(term) for term in terms], order, _flat(out), root)

    def reduce_scatter_terms(
        self, terms: list[np.ndarray], order: Order, parts: Sequence[slice], out: np.ndarray
    ) -> None:
        """`allreduce_terms`, but rank r gets the elements ``parts[r]`` of the sum, and no others.

        Args:
            terms: this rank's, of one length; their content is lost.
            order: the same on every rank.
            parts: of all ranks, the same on every rank.
            out: where this rank's elements of the sum go.
        """
        with self._collective("reduce_scatter_terms", out):
            self._reduce_scatter_terms([_flat(term) for term in terms], order, parts, _flat(out))

    def allgather(self, array: np.ndarray, parts: Sequence[slice]) -> None:
        """Fill ``array`` everywhere: rank r has the elements ``parts[r]`` of it, and gives them to all.

        Args:
            array: of all elements, of which this rank has set its own. One in memory that all ranks share,
                as the sum of `allreduce_terms` may be, costs a barrier.
            parts: of all ranks, the same on every rank: back to back, in rank order, together everything.
        """
        with self._collective("allgather", array):
            self._allgather(_flat(array), parts)

    def barrier(self) -> None:
        """Return once every rank is here; the time goes to ``wait_s``."""
        with self._collective("barrier"):
            self._barrier()

    def allgather_obj(self, value: Any, *, what: str = "") -> list[Any]:
        """Return the JSON values of all ranks, in rank order.

        Args:
            value: of this rank, 64 MiB at most.
            what: what it is for, which travels with it; empty: the calling function.

        Raises:
            LaunchError: on every rank, naming what each is doing: another one has called something else.
        """
        return self._exchanged(value, control.purpose("allgather_obj", what))

    def broadcast_obj(self, value: Any, root: int = 0, *, what: str = "") -> Any:
        """Return the JSON value of ``root``; what the others pass is ignored. As `allgather_obj` else."""
        mine = value if self.rank == root else None
        return self._exchanged(mine, control.purpose(f"broadcast_obj of rank {root}", what))[root]

    def _exchanged(self, value: Any, purpose: control.Purpose) -> list[Any]:
        raw = control.encode(value, purpose)
        with self._collective("allgather_obj"):
            try:
                return control.decode(self._allgather_bytes(raw), purpose)
            except LaunchError:
                raise
            except (ValueError, MemoryError, OverflowError) as error:
                if self.survives:  # Cut short, and MPI says nothing: seen once in some 400 deaths.
                    raise RankLost("a rank has died") from error
                raise LaunchError(control.foreign(purpose)) from error

    def calls_of_all(self) -> list[int]:
        """Return ``calls`` of all ranks, in rank order; no message that others left behind disturbs it."""
        calls = self.calls
        with self._collective("calls_of_all"):
            return self._allgather_calls(calls)

    # Between two ranks ---------------------------------------------------------------------------

    def isend(self, array: np.ndarray, to: int, tag: int = 0) -> Pending:
        """Begin to send; messages of one tag to one rank arrive in the order in which they were sent.

        Args:
            array: contiguous and one-dimensional.
            to: a rank.
            tag: 0 to `TAGS` - 1; what is received with it.
        """
        self.record.sent_bytes += array.nbytes
        with self._errors_as_ours():
            return _Timed(self._isend(_flat(array), to, tag), self, f"send to rank {to}")

    def irecv(self, array: np.ndarray, source: int, tag: int = 0) -> Pending:
        """Begin to receive, into an array of the length and dtype of what is sent with this tag."""
        with self._errors_as_ours():
            return _Timed(self._irecv(_flat(array), source, tag), self, f"receive from rank {source}")

    # Deaths --------------------------------------------------------------------------------------

    @property
    def survives(self) -> bool:
        """Whether a rank that dies is an error of its own for the others, `RankLost`, and not their end."""
        return False

    def regroup(self, fine: bool = True, at: str = AGREEMENT) -> list[int] | None:
        """Agree with all who live that everything is fine, else go on as a smaller group; a collective.

        The others keep their order: the first of them is rank 0. Memory that ranks shared is forgotten, and
        what was under way is lost. Comms made by `grid` before are of no use any more, but for this one.

        Args:
            fine: whether this rank has met no `RankLost` since the last time.
            at: what is said of a rank that waits here.

        Returns:
            None where all was fine; else the ranks that have died since, by `origin`.
        """
        return None

    # Smaller groups ------------------------------------------------------------------------------

    def grid(self, shape: Sequence[int], axes: Sequence[Sequence[int]]) -> list[Comm]:
        """Arrange the ranks as a grid, the last axis innermost, and make Comms along its axes; a collective.

        Args:
            shape: of the grid; its product is the number of ranks.
            axes: for each Comm wanted, the axes along which its ranks differ.

        Returns:
            For each, the ranks that differ from this one along these axes only, in the grid's order; this
            Comm itself where these are all ranks. They share this one's `record`.
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

    # What a transport provides -------------------------------------------------------------------

    def _first(self, count: int) -> Comm | None:
        raise self._cannot("be divided")

    def _isend(self, array: np.ndarray, to: int, tag: int) -> Pending:
        raise self._cannot("send to a single rank")

    def _irecv(self, array: np.ndarray, source: int, tag: int) -> Pending:
        raise self._cannot("receive from a single rank")

    def _reduce_scatter_terms(
        self, terms: list[np.ndarray], order: Order, parts: Sequence[slice], out: np.ndarray
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
    def _allreduce_terms(self, terms: list[np.ndarray], order: Order, out: np.ndarray) -> Sum: ...

    @abstractmethod
    def _reduce_terms(
        self, terms: list[np.ndarray], order: Order, out: np.ndarray, root: int
    ) -> Sum | None: ...

    @abstractmethod
    def _barrier(self) -> None: ...

    @abstractmethod
    def _allgather_bytes(self, raw: bytes) -> list[bytes]: ...

    def _allgather_calls(self, calls: int) -> list[int]:
        return [int(raw) for raw in self._allgather_bytes(str(calls).encode())]

    def understood(self, error: BaseException) -> BaseException:
        """An error of the transport as one of ours, where it is one."""
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
        # Not in a `finally`: a rank that failed inside a collective has not left it.
        self.record.waiting = None
        elapsed = time.monotonic() - begun
        if verb == "barrier":
            self.record.wait_s += elapsed
        else:
            self.record.comm_s += elapsed


class SerialComm(Comm):
    """One rank. Every sum is its own term, every broadcast has arrived."""

    rank = 0
    size = 1

    def _allreduce(self, array: np.ndarray) -> None:
        pass

    def _broadcast(self, array: np.ndarray, root: int) -> None:
        pass

    def _gather(self, array: np.ndarray, root: int) -> np.ndarray | None:
        return array.reshape(1, -1)

    def _allreduce_terms(self, terms: list[np.ndarray], order: Order, out: np.ndarray) -> Sum:
        total = add_in_order(terms, order.additions)
        if total is not out:
            np.copyto(out, total)
        return Sum(out)

    def _reduce_terms(self, terms: list[np.ndarray], order: Order, out: np.ndarray, root: int) -> Sum | None:
        return self._allreduce_terms(terms, order, out)

    def _reduce_scatter_terms(
        self, terms: list[np.ndarray], order: Order, parts: Sequence[slice], out: np.ndarray
    ) -> None:
        np.copyto(out, add_in_order(terms, order.additions)[parts[0]])

    def _allgather(self, array: np.ndarray, parts: Sequence[slice]) -> None:
        pass

    def _barrier(self) -> None:
        pass

    def _allgather_bytes(self, raw: bytes) -> list[bytes]:
        return [raw]


class _Timed:
    """A message whose waiting counts as communication, and is seen by whoever looks for a rank that waits."""

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
            f"a collective takes a contiguous 1-D array, not shape {array.shape}; see parallel/flat.py"
        )
    return array
