"""`Comm`: a rank, a size, and MPI's verbs on flat NumPy arrays.

Everything above this room is written against these few verbs. `SerialComm` is the null object: one
rank for whom every collective is already complete, so that no code above needs ``if size > 1``.

Legend: R ranks.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# What `allgather_obj` and `broadcast_obj` carry is small by intent: facts, paths, manifests.
OBJECT_BYTES_LIMIT = 64 << 20


class Comm(ABC):
    """A group of ranks that talk.

    Every verb is a collective: all ranks call the same verbs in the same order, with arrays of one
    length and dtype. Arrays are contiguous, one-dimensional, and changed in place.

    Attributes:
        rank: this process, 0 <= rank < size.
        size: number of ranks, R.
        comm_s: seconds spent moving and reducing arrays so far.
        wait_s: seconds spent in `barrier`, waiting for slower ranks.
        waiting: the verb this rank is inside of and when it entered it (`time.monotonic`), or None.
        calls: collectives begun so far.
        before: called with verb, array (or None) and root at the beginning of every collective; does
            nothing, unless `debug.keep_order` has put its comparison there.
    """

    rank: int
    size: int

    def __init__(self) -> None:
        self.comm_s = 0.0
        self.wait_s = 0.0
        self.waiting: tuple[str, float] | None = None
        self.calls = 0
        self.before: Callable[[str, np.ndarray | None, int], None] = _nothing

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

    def barrier(self) -> None:
        """Return once every rank is here; the time goes to ``wait_s``."""
        with self._collective("barrier"):
            self._barrier()

    def allgather_obj(self, value: Any) -> list[Any]:
        """Return the JSON values of all ranks, in rank order."""
        with self._collective("allgather_obj"):
            return [json.loads(raw) for raw in self._allgather_bytes(_encode(value))]

    def broadcast_obj(self, value: Any, root: int = 0) -> Any:
        """Return the JSON value of ``root``; what the others pass is ignored."""
        return self.allgather_obj(value if self.rank == root else None)[root]

    # What a transport provides -------------------------------------------------------------------

    @abstractmethod
    def _allreduce(self, array: np.ndarray) -> None: ...

    @abstractmethod
    def _broadcast(self, array: np.ndarray, root: int) -> None: ...

    @abstractmethod
    def _gather(self, array: np.ndarray, root: int) -> np.ndarray | None: ...

    @abstractmethod
    def _barrier(self) -> None: ...

    @abstractmethod
    def _allgather_bytes(self, raw: bytes) -> list[bytes]: ...

    @contextmanager
    def _collective(self, verb: str, array: np.ndarray | None = None, root: int = 0) -> Iterator[None]:
        begun = time.monotonic()
        self.calls += 1
        self.waiting = (verb, begun)
        self.before(verb, array, root)
        yield
        # Not in a `finally`: a rank that failed inside a collective has not left it.
        self.waiting = None
        elapsed = time.monotonic() - begun
        if verb == "barrier":
            self.wait_s += elapsed
        else:
            self.comm_s += elapsed


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

    def _barrier(self) -> None:
        pass

    def _allgather_bytes(self, raw: bytes) -> list[bytes]:
        return [raw]


def _nothing(verb: str, array: np.ndarray | None, root: int) -> None:
    pass


def _flat(array: np.ndarray) -> np.ndarray:
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(
            f"a collective takes a contiguous 1-D array, not shape {array.shape}; see parallel/flat.py"
        )
    return array


def _encode(value: Any) -> bytes:
    raw = json.dumps(value, separators=(",", ":")).encode()
    if len(raw) > OBJECT_BYTES_LIMIT:
        raise ValueError(f"{len(raw)} bytes are too many for an object; send an array")
    return raw
