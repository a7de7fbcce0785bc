"""Tensors that go one rank further round a ring, inside a compiled step, while it computes something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.comm.base import Comm, Pending
from tf_dist.errors import called_by_a_graph
from tf_dist.parallel.flat import aligned_empty


class Ring:
    """The ranks of a Comm in a ring: each gives to the next one and takes from the one before.

    `begin` and `end` are operations of a graph, or run at once outside of one. TensorFlow starts what is
    ready in whatever order, and messages have none but that in which they are posted: so each begins after
    the one before it, on all ranks alike, and whoever uses this says so by ``after``. XLA compiles neither.

    Args:
        comm: along which the ring lies.
    """

    def __init__(self, comm: Comm) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._comm = comm
        self._under_way: dict[int, tuple[list[Pending], list[np.ndarray]]] = {}
        self._begun = 0

    def begin(self, tensors: list[Any], after: list[Any]) -> Any:
        """Give these to the next rank, and begin to take as many, as large, from the one before.

        Args:
            tensors: on every rank of the same shapes and types; not changed, and not copied.
            after: tensors without which this does not begin.

        Returns:
            What `end` takes.
        """
        with tf.control_dependencies(after):
            return _call(self._begin, tensors, tf.int64)

    def end(self, begun: Any, like: list[Any], after: list[Any]) -> list[Any]:
        """What the rank before gave.

        Args:
            begun: from `begin`.
            like: tensors with the shapes and types of those that arrive.
            after: what is to be computed meanwhile.
        """
        with tf.control_dependencies(after):
            arrived = _call(self._end, [begun], [one.dtype for one in like])
        return [tf.ensure_shape(one, other.shape) for one, other in zip(arrived, like, strict=True)]

    def _begin(self, *arrays: np.ndarray) -> np.int64:
        room = [_like(array) for array in arrays]
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        # Where to put what comes is said before anything is sent: it then need not wait in MPI's own memory.
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
    """An array's memory: MPI knows no bfloat16."""
    return array.reshape(-1).view(np.uint8)


def _like(array: np.ndarray) -> np.ndarray:
    """Room for an array, where TensorFlow can use it without copying it."""
    return aligned_empty(array.size, array.dtype).reshape(array.shape)
