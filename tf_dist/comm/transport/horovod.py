"""`HorovodComm`: the verbs of `Comm`, implemented by Horovod's tensor operations.

Only ``hvd.allreduce``, ``hvd.allgather`` and ``hvd.broadcast`` on plain tensors are used. Horovod's
optimizer and callbacks are not: Keras 3 never calls them, and training runs
unsynchronized without an error (``scripts/check_peers.py`` shows it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.comm.transport.reduction_order import Reduced, ReductionOrder
from tf_dist.errors import BackendMissing

HOW_TO_GET_IT = (
    "`--backend horovod` needs Horovod 0.28.1 built for this TensorFlow: run `make horovod`. "
    "The built-in `--backend mpi` needs nothing and is faster."
)


class HorovodComm(Comm):
    """All ranks of the job, as Horovod sees them.

    Args:
        load_tensorflow: imports TensorFlow with this rank's settings, before Horovod does.

    Raises:
        BackendMissing: Horovod is not installed, or not built for this TensorFlow.
    """

    keeps_order = False

    def __init__(self, load_tensorflow: Callable[[], None]) -> None:
        super().__init__()
        self._hvd = _import_horovod(load_tensorflow)
        self._hvd.init()
        self.rank = self._hvd.rank()
        self.size = self._hvd.size()

    def _allreduce(self, array: np.ndarray) -> None:
        total = self._hvd.allreduce(_tensor(array), op=self._hvd.Sum, name=_name("allreduce", array))
        array[:] = np.asarray(total)

    def _broadcast(self, array: np.ndarray, root: int) -> None:
        array[:] = np.asarray(
            self._hvd.broadcast(_tensor(array), root_rank=root, name=_name("broadcast", array))
        )

    def _gather(self, array: np.ndarray, root: int) -> np.ndarray | None:
        # Horovod has no gather to one rank: every rank gets everything.
        rows = self._hvd.allgather(_tensor(array), name=_name("gather", array))
        return np.array(rows).reshape(self.size, -1) if self.rank == root else None

    # Horovod has its own, fixed order of summation: sums are equal within 1e-6 and not in bits. Its
    # all-to-all could carry the terms, but each of its operations waits for the next cycle.

    def _allreduce_terms(self, terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray) -> Reduced:
        np.copyto(out, _own_sum(terms, out))
        self._allreduce(out)
        return Reduced(out)

    def _reduce_terms(
        self, terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray, root: int
    ) -> Reduced | None:
        rows = self._gather(_own_sum(terms, out), root)
        if rows is None:
            return None
        np.copyto(out, rows.sum(axis=0))
        return Reduced(out)

    def _barrier(self) -> None:
        self._hvd.allreduce(_tensor(np.zeros(1, np.float32)), op=self._hvd.Sum, name="tf_dist.barrier")

    def _allgather_bytes(self, raw: bytes) -> list[bytes]:
        counts = np.array(self._hvd.allgather(_tensor(np.array([len(raw)], np.int64)), name="tf_dist.counts"))
        everything = np.array(
            self._hvd.allgather(_tensor(np.frombuffer(raw, np.uint8)), name="tf_dist.bytes")
        )
        return [part.tobytes() for part in np.split(everything, np.cumsum(counts)[:-1])]


def _own_sum(terms: list[np.ndarray], like: np.ndarray) -> np.ndarray:
    """The sum of one rank's terms, zeros if it has none."""
    total = terms[0] if terms else np.zeros_like(like)
    for term in terms[1:]:
        total += term
    return total


def _name(verb: str, array: np.ndarray) -> str:
    """A name that all ranks agree on, the same for each call: Horovod pairs and caches operations by it."""
    return f"tf_dist.{verb}.{array.dtype}.{array.size}"


def _tensor(array: np.ndarray) -> Any:
    import tensorflow as tf

    return tf.convert_to_tensor(array)


def _import_horovod(load_tensorflow: Callable[[], None]) -> Any:
    try:
        import horovod  # noqa: F401 - its absence is found before TensorFlow is loaded

        load_tensorflow()
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise BackendMissing(f"{HOW_TO_GET_IT} (Python said: {error})") from error
    except Exception as error:  # HorovodVersionMismatchError, undefined symbols: not one class
        raise BackendMissing(f"Horovod is installed but does not load ({error}). {HOW_TO_GET_IT}") from error
    return hvd
