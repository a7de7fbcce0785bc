"""Differentiable collectives between tensor-parallel ranks, inside a compiled step.

Around a partitioned layer, ranks hold equal activations before it and partial sums after it. Megatron-LM
(Shoeybi et al. 2019, section 3) needs two operations there, conjugate to each other: `copied` (its f) is the
identity in the forward and an all-reduce in the backward pass, `summed` (its g) the reverse. Two more are for
arrays whose last axis is partitioned: `gathered` and `own_part`.

They call NumPy in the middle of a compiled step, `tf.numpy_function(stateful=True)`. TensorFlow runs stateful
calls in program order, and every rank traces the same graph: so all ranks communicate in one order, in the
backward pass, in evaluation and with any number of threads, too, once `keep_order` has disabled the
optimization that breaks this promise. XLA cannot compile them.

All ranks get the same bits: MPI requires it of an all-reduce (MPI 4.1, section 6.9.6), and a window has one
sum that all ranks read. They must: replicated weights would drift apart otherwise.

Legend: R ranks, N rows, all axes but the last; D elements of the last axis, d of them on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.comm.transport.reduction_order import ReductionOrder
from tf_dist.errors import called_by_a_graph
from tf_dist.parallel.flat_buffer import aligned_empty

# Sums of this many elements and more (256 KiB) use a shared window, if there is one: the fewer cores a
# rank has the more it saves (docs/decisions/0019-tensor-parallel.md has the figures).
WINDOW_FROM = 1 << 16


def keep_order() -> None:
    """Make TensorFlow run stateful calls in program order, as it promises; for the whole process.

    Its graphs have control edges for that, but Grappler's dependency optimizer removes some of them around
    loops (TensorFlow 2.21): a call after the loop of an LSTM overtook another one, on one rank and not on
    the other, and both deadlocked. Graphs that have run already are not changed.
    """
    tf.config.optimizer.set_experimental_options({"dependency_optimization": False})


def copied(comm: Comm, x: Any) -> Any:
    """Identity; its gradient is all-reduced (Megatron's f). For replicated tensors."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any) -> Any:
        return tf.identity(x), lambda dx: _sum(comm, dx)

    return run(x)


def summed(comm: Comm, x: Any) -> Any:
    """All-reduce; its gradient is the identity (Megatron's g). For partial results.

    Types shorter than float32 are summed as float32, and rounded once.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any) -> Any:
        return _sum(comm, x), tf.identity

    return run(x)


def gathered(comm: Comm, x_Nxd: tf.Tensor, parts: Sequence[range]) -> Any:
    """All-gather along the last axis, (..., D); its gradient is this rank's slice.

    Every rank uses the result in the same way, so the gradient is not summed.

    Args:
        comm: the ranks.
        x_Nxd: this rank's slice.
        parts: the ranges of all ranks in the last axis, contiguous.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any) -> Any:
        return _gather(comm, x, parts), lambda dy: _take(dy, parts[comm.rank])

    return run(x_Nxd)


def own_part(comm: Comm, x_NxD: tf.Tensor, parts: Sequence[range]) -> Any:
    """A rank's slice of the last axis, (..., d), of a replicated tensor; its gradient is all-gathered."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any) -> Any:
        return _take(x, parts[comm.rank]), lambda dy: _gather(comm, dy, parts)

    return run(x_NxD)


def stacked(comm: Comm, x: Any) -> Any:
    """Stack the arrays of all ranks, of one shape, as (R, ...). It has no gradient."""
    return _talk(lambda array: stack_arrays(comm, array), tf.stop_gradient(x), (comm.size, *x.shape))


def _sum(comm: Comm, x: Any) -> Any:
    """An all-reduce inside a graph, of the dtype and shape of ``x``."""
    wide = x if x.dtype.size >= tf.float32.size else tf.cast(x, tf.float32)
    return tf.cast(_talk(lambda array: sum_arrays(comm, array), wide, x.shape), x.dtype)


def _gather(comm: Comm, x: Any, parts: Sequence[range]) -> Any:
    shape = (*x.shape[:-1], parts[-1].stop)
    return _talk(lambda array: gather_arrays(comm, array, parts), x, shape)


def _take(x: Any, part: range) -> Any:
    return x[..., part.start : part.stop]


def _talk(function: Callable[[np.ndarray], np.ndarray], x: Any, shape: Any) -> Any:
    """Call a communicating function of arrays from inside a graph."""
    plainly = tf.autograph.experimental.do_not_convert(called_by_a_graph(function))
    y = tf.numpy_function(plainly, [x], x.dtype, stateful=True)
    return tf.ensure_shape(y, shape)


def sum_arrays(comm: Comm, array: np.ndarray) -> np.ndarray:
    """All-reduce an array, with the same bits on each rank; a collective."""
    out = aligned_empty(array.size, array.dtype)
    buffers = None
    if array.size >= WINDOW_FROM and array.dtype == np.float32:
        order = ReductionOrder((1,) * comm.size, tuple((0, rank) for rank in range(1, comm.size)))
        buffers = comm.term_buffers(array.size, order)
    if buffers is None:
        np.copyto(out, array.reshape(-1))
        comm.allreduce(out)
    else:
        (mine,) = buffers()
        np.copyto(mine, array.reshape(-1))
        # Copied: other ranks will write there.
        np.copyto(out, comm.allreduce_terms([mine], order, mine).array)
    return out.reshape(array.shape)


def gather_arrays(comm: Comm, array: np.ndarray, parts: Sequence[range]) -> np.ndarray:
    """All-gather along the last axis; a collective."""
    rows = array.shape[:-1]
    count = int(np.prod(rows, dtype=np.int64))
    everything = aligned_empty(count * parts[-1].stop, array.dtype)
    places = [slice(count * part.start, count * part.stop) for part in parts]
    everything[places[comm.rank]] = array.reshape(-1)
    # As bytes: MPI has no bfloat16.
    size = array.itemsize
    in_bytes = [slice(size * place.start, size * place.stop) for place in places]
    comm.allgather(everything.view(np.uint8), in_bytes)
    out = aligned_empty(everything.size, array.dtype).reshape(*rows, parts[-1].stop)
    for part, place in zip(parts, places, strict=True):
        out[..., part.start : part.stop] = everything[place].reshape(*rows, len(part))
    return out


def stack_arrays(comm: Comm, array: np.ndarray) -> np.ndarray:
    """Stack the arrays of all ranks, of one shape, as (R, ...); a collective."""
    n = array.size
    everything = gather_arrays(comm, array.reshape(-1), [range(r * n, (r + 1) * n) for r in range(comm.size)])
    return everything.reshape(comm.size, *array.shape)
