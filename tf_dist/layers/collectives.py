"""What ranks that share a layer tell each other inside a step, as operations with gradients.

Where a layer is divided, ranks hold the same activations before it and partial sums behind it. Megatron-LM
(Shoeybi et al. 2019, section 3) needs two operations there, conjugate to each other: `copied` (its f) does
nothing on the way forward and sums on the way back, `summed` (its g) the other way round. Two more, for
arrays whose last axis is divided: `gathered` and `own_part`.

They call NumPy in the middle of a compiled step, `tf.numpy_function(stateful=True)`. TensorFlow runs stateful
calls in the order in which the graph was written, and every rank writes the same graph: so all ranks talk in
one order, on the way back, in evaluation and with any number of threads, too, once `keep_order` has switched
off what breaks this promise. XLA cannot compile them.

All ranks get the same bits: MPI requires it of a sum (MPI 4.1, section 6.9.6), and a window has one sum that
all look at. They must: weights which every rank holds would drift apart otherwise.

Legend: R ranks, N rows, all axes but the last; D elements of the last axis, d of them on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.comm.base import Comm
from tf_dist.comm.sums import Order
from tf_dist.errors import called_by_a_graph
from tf_dist.parallel.flat import aligned_empty

# Sums of this many elements and more (256 KiB) lie in a shared window, where there is one: the fewer cores a
# rank has the more it saves (docs/decisions/0019-tensor-parallel.md has the figures).
WINDOW_FROM = 1 << 16


def keep_order() -> None:
    """Let TensorFlow run stateful calls in the order of the program, as it promises; for the whole process.

    Its graphs say so, by control edges, but Grappler's dependency optimizer takes some of them away around
    loops (TensorFlow 2.21): a call behind the loop of an LSTM overtook another one, on one rank and not on
    the other, and both waited for ever. Graphs that have run already stay as they are.
    """
    tf.config.optimizer.set_experimental_options({"dependency_optimization": False})


def copied(comm: Comm, x: Any) -> Any:
    """The same tensor; its gradient is summed over all ranks (Megatron's f). For what every rank holds."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any) -> Any:
        return tf.identity(x), lambda dx: _sum(comm, dx)

    return run(x)


def summed(comm: Comm, x: Any) -> Any:
    """The sum over all ranks; its gradient passes as it is (Megatron's g). For partial results.

    Types shorter than float32 are summed as float32, and rounded once.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any) -> Any:
        return _sum(comm, x), tf.identity

    return run(x)


def gathered(comm: Comm, x_Nxd: Any, parts: Sequence[range]) -> Any:
    """Put together what the ranks have of the last axis, (..., D); each keeps its part of the gradient.

    The gradient is that of a result which every rank uses in the same way, so it is not summed.

    Args:
        comm: the ranks.
        x_Nxd: this rank's part.
        parts: the places of all ranks' parts in the last axis, back to back.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any) -> Any:
        return _gather(comm, x, parts), lambda dy: _take(dy, parts[comm.rank])

    return run(x_Nxd)


def own_part(comm: Comm, x_NxD: Any, parts: Sequence[range]) -> Any:
    """A rank's part of the last axis, (..., d), of what every rank holds; its gradient is gathered."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any) -> Any:
        return _take(x, parts[comm.rank]), lambda dy: _gather(comm, dy, parts)

    return run(x_NxD)


def stacked(comm: Comm, x: Any) -> Any:
    """The arrays of all ranks, of one shape, as (R, ...). It has no gradient."""
    return _talk(lambda array: stack_arrays(comm, array), tf.stop_gradient(x), (comm.size, *x.shape))


def _sum(comm: Comm, x: Any) -> Any:
    """A sum over all ranks inside a graph, of the type and shape of ``x``."""
    wide = x if x.dtype.size >= tf.float32.size else tf.cast(x, tf.float32)
    return tf.cast(_talk(lambda array: sum_arrays(comm, array), wide, x.shape), x.dtype)


def _gather(comm: Comm, x: Any, parts: Sequence[range]) -> Any:
    shape = (*x.shape[:-1], parts[-1].stop)
    return _talk(lambda array: gather_arrays(comm, array, parts), x, shape)


def _take(x: Any, part: range) -> Any:
    return x[..., part.start : part.stop]


def _talk(function: Callable[[np.ndarray], np.ndarray], x: Any, shape: Any) -> Any:
    """Call a function of arrays, which talks, from inside a graph."""
    plainly = tf.autograph.experimental.do_not_convert(called_by_a_graph(function))
    y = tf.numpy_function(plainly, [x], x.dtype, stateful=True)
    return tf.ensure_shape(y, shape)


def sum_arrays(comm: Comm, array: np.ndarray) -> np.ndarray:
    """The sum of an array over all ranks, with the same bits on each; a collective."""
    out = aligned_empty(array.size, array.dtype)
    buffers = None
    if array.size >= WINDOW_FROM and array.dtype == np.float32:
        order = Order((1,) * comm.size, tuple((0, rank) for rank in range(1, comm.size)))
        buffers = comm.term_buffers(array.size, order)
    if buffers is None:
        np.copyto(out, array.reshape(-1))
        comm.allreduce(out)
    else:
        (mine,) = buffers()
        np.copyto(mine, array.reshape(-1))
        # Copied: others will write there.
        np.copyto(out, comm.allreduce_terms([mine], order, mine).array)
    return out.reshape(array.shape)


def gather_arrays(comm: Comm, array: np.ndarray, parts: Sequence[range]) -> np.ndarray:
    """The parts of all ranks side by side along the last axis; a collective."""
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
    """The arrays of all ranks, of one shape, as (R, ...); a collective."""
    n = array.size
    everything = gather_arrays(comm, array.reshape(-1), [range(r * n, (r + 1) * n) for r in range(comm.size)])
    return everything.reshape(comm.size, *array.shape)
