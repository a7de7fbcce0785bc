"""Ring exchange: send tensors to the next rank inside a compiled step, overlapped with computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.comm.transport.base import Comm, Pending
from tf_dist.errors import called_by_a_graph
from tf_dist.parallel.flat_buffer import aligned_empty


class RingExchange:
    """The ranks of a Comm in a ring: each sends to the next one and receives from the previous one.

    `begin` and `end` are operations of a graph, or run eagerly outside of one. TensorFlow starts operations
    that are ready in any order, while messages are matched in the order in which they are posted: so each
    exchange must start after the previous one, on all ranks, which callers enforce by ``after``. XLA compiles
    neither.

    Args:
        comm: the ranks of the ring.
    """

    def __init__(self, comm: Comm) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._comm = comm
        self._under_way: dict[int, tuple[list[Pending], list[np.ndarray]]] = {}
        self._begun = 0

    def begin(self, tensors: list[Any], after: list[Any]) -> Any:
        """Start to send to the next rank, and to receive tensors of the same shapes from the previous one.

        Args:
            tensors: on every rank of the same shapes and types; not changed, and not copied.
            after: control dependencies.

        Returns:
            A handle for `end`.
        """
        with tf.control_dependencies(after):
            return _call(self._begin, tensors, tf.int64)

    def end(self, begun: Any, like: list[Any], after: list[Any]) -> list[Any]:
        """Wait for the tensors of the previous rank.

        Args:
            begun: from `begin`.
            like: tensors with the shapes and types of those that arrive.
            after: computations that overlap the exchange.
        """
        with tf.control_dependencies(after):
            arrived = _call(self._end, [begun], [one.dtype for one in like])
        return [tf.ensure_shape(one, other.shape) for one, other in zip(arrived, like, strict=True)]

    def _begin(self, *arrays: np.ndarray) -> np.int64:
        room = [_like(array) for array in arrays]
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        # Receives are posted before sends: then messages need no buffer of MPI's own.
        pending = [self._comm.irecv(_bytes(array), source) for array in room]
        pending += [self._comm.isend(_bytes(array), to) for array in arrays]
        self._begun += 1
        self._under_way[self._begun] = pending, room
        return np.int64(self._begun)

    def _end(self, begun: np.int64) -> list[np.ndarray]:
        pending, room = self._under_way.pop(int(begun))
        for one in pending:
            one.wait()
        return room


def _call(function: Callable[..., Any], inputs: list[Any], types: Any) -> Any:
    """Call a function of arrays from inside a graph."""
    plainly = tf.autograph.experimental.do_not_convert(called_by_a_graph(function))
    return tf.numpy_function(plainly, inputs, types, stateful=True)


def _bytes(array: np.ndarray) -> np.ndarray:
    """An array's memory as bytes: MPI knows no bfloat16."""
    return array.reshape(-1).view(np.uint8)


def _like(array: np.ndarray) -> np.ndarray:
    """An uninitialized array, aligned so that TensorFlow can use it without a copy."""
    return aligned_empty(array.size, array.dtype).reshape(array.shape)
