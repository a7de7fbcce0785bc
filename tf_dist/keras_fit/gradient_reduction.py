"""Reduce tensors of a TensorFlow graph over the ranks: the line where `model.fit` communicates.

Every exchange begins with a roll call of a few numbers. A rank that has ended its training, or is in
another place of the step, is found there; without it the others would wait for ever, or add up numbers
that do not belong together.

Legend: B rows on this rank, G global rows, R ranks, P numbers of all gradients together.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import numpy as np
import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import LaunchError, NumericError, UsageError, called_by_a_graph
from tf_dist.keras_fit.data_fingerprints import compare_all
from tf_dist.keras_fit.graph_inputs import depends_on
from tf_dist.parallel.aggregator import Aggregator
from tf_dist.parallel.aggregators import Allreduce, Automatic
from tf_dist.parallel.flat_buffer import aligned_empty

# What a roll call sums over the ranks: flags, then a digest of where the rank is (its two halves, and
# their squares: R * sum(h^2) = (sum h)^2 only where all h are equal, in numbers that float64 holds
# exactly up to 8,192 ranks), then up to PAYLOAD numbers of the caller.
ENDED, NOT_FINITE, LOW, LOW_SQUARED, HIGH, HIGH_SQUARED = range(6)
HEADER, PAYLOAD = 6, 4
HALF_BITS = 16


class Reduction:
    """Sums over all ranks, as operations of a TensorFlow graph or called eagerly.

    In a graph they run in the order in which they were written, the same on every rank: each hands a token to
    the next. (TensorFlow orders what touches one variable, and nothing else.)

    Args:
        comm: all ranks.
        aggregator: sums the dense gradients of variables; everything else is always summed whole.
    """

    def __init__(self, comm: Comm, aggregator: Aggregator | None = None) -> None:
        self.comm, self._steps = comm, 0
        self.aggregator = Automatic() if aggregator is None else aggregator
        self.aggregator.taken = True
        self._whole = Allreduce()
        # Of which gradients the aggregator has been set up for: their names and shapes.
        self._known: dict[str, tuple[tuple[int, ...], ...]] = {}

    # In a graph ----------------------------------------------------------------------------------

    def mean(
        self, gradients: Sequence[Any], names: Sequence[str] = (), sparse: bool = False, data: Any = None
    ) -> list[Any]:
        """Gradients averaged over the ranks, each of its own dtype; None stays None.

        Dense ones cross as one flat array, of float32 (float64 where a gradient is that).

        Args:
            gradients: of this rank.
            names: of their variables: the ranks must bring gradients of the same ones.
            sparse: whether gradients of embeddings stay `tf.IndexedSlices`, as one process has them: of the
                slices of all ranks in their order, where they are those of rows; those of positions, which
                all rows have in common, are averaged one by one. Else they become dense.
            data: of the step, which tells rows from positions.
        """
        slices = {
            place: self._mean_slices(gradient, str(names[place : place + 1]), data)
            for place, gradient in enumerate(gradients)
            if sparse and isinstance(gradient, tf.IndexedSlices)
        }
        rest = [None if place in slices else gradient for place, gradient in enumerate(gradients)]
        brought = [name for name, one in zip(names, gradients, strict=False) if one is not None]
        what = f"the gradients of {', '.join(brought) or 'no variable'}"
        means = self._mean_dense(rest, what, self.aggregator)
        return [slices.get(place, mean) for place, mean in enumerate(means)]

    def _mean_slices(self, slices: tf.IndexedSlices, name: str, data: Any) -> tf.IndexedSlices:
        if not self._are_of_rows(slices.indices, name, data):
            what = f"the gradient of {name}, by positions"
            (values,) = self._mean_dense([slices.values], what, self._whole)
            return tf.IndexedSlices(values, slices.indices, slices.dense_shape)
        values = self.gather_rows(slices.values, f"the gradient of {name}")
        indices = self.gather_rows(slices.indices, f"the indices of the gradient of {name}")
        values = values / tf.cast(self.comm.size, values.dtype)
        return tf.IndexedSlices(values, indices, slices.dense_shape)

    def _are_of_rows(self, indices: Any, name: str, data: Any) -> bool:
        """Whether indices come from the batch; eagerly nothing tells but that ranks have other ones."""
        if not tf.executing_eagerly():
            return depends_on(indices, data)
        everyone = self.gather_rows(indices, f"the indices of the gradient of {name}")
        alike = len(everyone) == self.comm.size * len(indices)
        alike = alike and bool(tf.reduce_all(tf.reshape(everyone, (self.comm.size, -1)) == indices))
        (ranks,) = self.sums([tf.constant(float(alike))], f"whether {name} has positions")
        return bool(ranks < self.comm.size)

    def _mean_dense(self, gradients: Sequence[Any], what: str, aggregator: Aggregator) -> list[Any]:
        dense = [tf.convert_to_tensor(gradient) for gradient in gradients if gradient is not None]
        wide = tf.float64 if any(tensor.dtype == tf.float64 for tensor in dense) else tf.float32
        flats = [tf.reshape(tf.cast(tensor, wide), (-1,)) for tensor in dense]
        flat = tf.concat(flats, axis=0) if flats else tf.zeros((0,), wide)

        known = all(tensor.shape.is_fully_defined() for tensor in dense)
        shapes = [tuple(tensor.shape) for tensor in dense] if known else None

        def mean(flat_P: np.ndarray) -> np.ndarray:
            return self._mean(flat_P, shapes or [flat_P.shape], what, aggregator)

        total = tf.ensure_shape(_call(mean, [flat], wide), flat.shape)
        if not dense:
            return list(gradients)
        parts = tf.split(total, [_size(tensor) for tensor in dense], num=len(dense))
        back = (tf.cast(tf.reshape(part, tf.shape(t)), t.dtype) for part, t in zip(parts, dense, strict=True))
        return [None if gradient is None else next(back) for gradient in gradients]

    def all_finite(self, finite: Any) -> Any:
        """Whether a boolean tensor, (), is true on every rank."""

        def everywhere(here: np.ndarray) -> np.ndarray:
            sums = self._meet("the check for finite gradients", not_finite=not here)
            return np.asarray(sums[NOT_FINITE] == 0)

        return tf.ensure_shape(_call(everywhere, [finite], tf.bool), ())

    def sums(self, numbers: Sequence[Any], what: str) -> list[Any]:
        """Up to four scalars, summed over the ranks in float64; not differentiable.

        Args:
            numbers: tensors of shape (); their dtypes are kept.
            what: they are, for the message where another rank is elsewhere.
        """
        packed = tf.stack([tf.cast(tf.stop_gradient(number), tf.float64) for number in numbers])

        def total(values: np.ndarray) -> np.ndarray:
            return self._meet(what, payload=values)[HEADER : HEADER + len(values)]

        totals = tf.ensure_shape(_call(total, [packed], tf.float64), (len(numbers),))
        return [tf.cast(one, number.dtype) for one, number in zip(tf.unstack(totals), numbers, strict=True)]

    def sum(self, tensor: Any, what: str) -> Any:
        """A tensor of the same shape on all ranks, summed over them; differentiable.

        What depends on the sum does so on every rank, so its gradient is the sum of all ranks' gradients.
        """

        def total(array: np.ndarray) -> np.ndarray:
            self._meet(f"{what}: {array.shape}")
            summed = np.array(array, order="C")
            self.comm.allreduce(summed.reshape(-1))
            return summed

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def summed(here: Any) -> Any:
            def gradient(upstream: Any) -> Any:
                return tf.ensure_shape(_call(total, [upstream], here.dtype), here.shape)

            return tf.ensure_shape(_call(total, [here], here.dtype), here.shape), gradient

        return summed(tensor)

    def gather_rows(self, tensor: Any, what: str) -> Any:
        """The rows (G, ...) of all ranks, in their order, of rows (B, ...) on each; differentiable.

        The gradient of this rank's rows is R times that of the global rows: the mean over ranks, which
        follows, then is the gradient of the one global loss that every rank computes.
        """

        def gathered(rows: np.ndarray) -> Any:
            return self._gather_rows(np.asarray(rows), what)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def everyones(here: Any) -> Any:
            everyone, first = _call(gathered, [here], [here.dtype, tf.int32])
            start, size = tf.ensure_shape(first, ()), tf.shape(here)[0]

            def gradient(upstream: Any) -> Any:
                return self.comm.size * upstream[start : start + size]

            return tf.ensure_shape(everyone, tf.TensorShape([None]).concatenate(here.shape[1:])), gradient

        tensor = tf.convert_to_tensor(tensor)
        if tensor.dtype == tf.bool:
            return tf.cast(everyones(tf.cast(tensor, tf.uint8)), tf.bool)
        return everyones(tensor)

    # Outside of graphs ---------------------------------------------------------------------------

    def end(self) -> None:
        """Say that this rank's epoch, or evaluation, has ended; a collective.

        Raises:
            LaunchError: other ranks go on.
        """
        sums = self._roll_call("the end of an epoch", ended=True)
        if sums[ENDED] != self.comm.size:
            self._fail(self._unequal_steps(sums))

    # On the ranks --------------------------------------------------------------------------------

    def _mean(
        self, flat_P: np.ndarray, shapes: list[tuple[int, ...]], what: str, aggregator: Aggregator
    ) -> np.ndarray:
        self.comm.record.next_step()
        # What is not finite would stay in the error feedback for ever.
        stops = not (aggregator.exact or _is_finite(flat_P))
        sums = self._meet(f"{what} ({flat_P.size} numbers)", not_finite=stops)
        if sums[NOT_FINITE]:
            self._not_finite(int(sums[NOT_FINITE]), what)
        self._steps += 1  # now that all ranks are here: in a dry run some fail on their way
        if self._steps & (self._steps - 1) == 0:  # steps 1, 2, 4 ...: a loop of the user has no other place
            compare_all(self.comm)
        # A new buffer each time: TensorFlow keeps what is returned, and variables may move into it.
        buffer_P = aligned_empty(flat_P.size, flat_P.dtype)
        if flat_P.size:
            self._prepare(aggregator, what, tuple(shapes), flat_P.dtype)
            total_P = aggregator.aggregate(flat_P, self.comm, buffer_P)
            np.divide(total_P, self.comm.size, out=buffer_P)
        return buffer_P

    def _prepare(
        self, aggregator: Aggregator, what: str, shapes: tuple[tuple[int, ...], ...], dtype: np.dtype
    ) -> None:
        """Set the aggregator up for gradients that it has not seen yet; a collective."""
        if aggregator is self._whole or self._known.get(what) == shapes:
            return
        if not aggregator.exact and self._known:
            raise UsageError(
                f"aggregator {aggregator} keeps what it has not sent of {_short(next(iter(self._known)))}; "
                f"this step brings {_short(what)}: use aggregator 'auto', or an optimizer with an aggregator "
                "of its own for each list of variables"
            )
        if not aggregator.exact and dtype != np.float32:
            raise UsageError(
                f"aggregator {aggregator} sums float32, and {_short(what)} are {dtype}: use 'auto'"
            )
        aggregator.setup(shapes, self.comm)
        aggregator.check_smaller()
        self._known[what] = shapes

    def _not_finite(self, ranks: int, what: str) -> NoReturn:
        raise NumericError(
            f"{_short(what)} are not finite on {ranks} of {self.comm.size} ranks, and aggregator "
            f"{self.aggregator} would keep them for ever: use a lower learning rate, or aggregator 'auto'"
        )

    def _gather_rows(self, rows: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
        kind = f"{what}: rows of {rows.shape[1:]} {rows.dtype}"
        counts = np.zeros(self.comm.size)
        counts[self.comm.rank] = len(rows)
        self._meet(kind)
        self.comm.allreduce(counts)
        ends = np.cumsum(counts.astype(np.int64))
        first = int(ends[self.comm.rank]) - len(rows)
        everyone = np.zeros((int(ends[-1]), *rows.shape[1:]), rows.dtype)
        everyone[first : first + len(rows)] = rows
        row_bytes = rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
        starts = np.concatenate([[0], ends[:-1]]) * row_bytes
        parts = [slice(int(a), int(b)) for a, b in zip(starts, ends * row_bytes, strict=True)]
        if everyone.nbytes and type(self.comm)._allgather is not Comm._allgather:
            self.comm.allgather(everyone.reshape(-1).view(np.uint8), parts)
        elif everyone.nbytes:  # Horovod's, which has none: zeros of the others are added
            wide = everyone.astype(np.float64)
            self.comm.allreduce(wide.reshape(-1))
            everyone = wide.astype(rows.dtype)
        return everyone, np.asarray(first, np.int32)

    def _meet(self, what: str, *, not_finite: bool = False, payload: np.ndarray | None = None) -> np.ndarray:
        """A roll call that everyone must answer from the same place of a training step."""
        sums = self._roll_call(what, not_finite=not_finite, payload=payload)
        if sums[ENDED]:
            self._fail(self._unequal_steps(sums))
        for half, squared in ((LOW, LOW_SQUARED), (HIGH, HIGH_SQUARED)):
            if self.comm.size * int(sums[squared]) != int(sums[half]) ** 2:
                self._fail(self._elsewhere(what))
        return sums

    def _elsewhere(self, what: str) -> str:
        everyone = self.comm.allgather_obj(what)
        ranks = {one: [r for r, theirs in enumerate(everyone) if theirs == one] for one in everyone}
        places = "; ".join(f"{_ranks(who)} in {_short(one)}" for one, who in ranks.items())
        return (
            f"the ranks are in different places of a step of model.fit: {places}. Their models, or the "
            "variables that get a gradient in this step, are not the same"
        )

    def _unequal_steps(self, sums: np.ndarray) -> str:
        """The same words on the ranks that have ended and on those that go on: the job has one voice."""
        return (
            f"{int(sums[ENDED])} of {self.comm.size} ranks have ended their training, or its epoch, while "
            "the others go on: the ranks took different numbers of steps. Give all of them the same data, "
            "or a dataset of tf_dist.shard(data, comm), and stop early on all ranks alike"
        )

    def _roll_call(
        self, what: str, *, ended: bool = False, not_finite: bool = False, payload: np.ndarray | None = None
    ) -> np.ndarray:
        digest = zlib.crc32(what.encode())
        low, high = digest & (1 << HALF_BITS) - 1, digest >> HALF_BITS
        message = np.zeros(HEADER + PAYLOAD)
        message[:HEADER] = ended, not_finite, low, low**2, high, high**2
        if payload is not None:
            message[HEADER : HEADER + len(payload)] = payload
        self.comm.allreduce(message)
        return message

    def _fail(self, message: str) -> NoReturn:
        raise LaunchError(message)


# The newest operation of each graph, as a tensor that the next one takes.
_tokens: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def order_after(tensor: Any) -> None:
    """Let the next exchange of the graph that is being traced wait for a tensor.

    Exchanges inside of a branch (`tf.cond`) hand no token out of it. What reads a variable that the branch
    writes comes after it.
    """
    if not tf.executing_eagerly():
        _tokens[tf.compat.v1.get_default_graph()] = tf.cast(tensor, tf.int64)


def _token() -> Any:
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        if graph in _tokens:
            return _tokens[graph]  # of an outer graph: it is captured, and the branch waits for it
        graph = getattr(graph, "outer_graph", None)
    return tf.constant(0, tf.int64)


def _call(function: Any, inputs: list[Any], dtypes: Any) -> Any:
    """Operations that call ``function`` with arrays, in their order; of one dtype, or of a list of them."""
    if tf.executing_eagerly():
        return tf.numpy_function(called_by_a_graph(function), inputs, dtypes, stateful=True)
    several = isinstance(dtypes, list)

    def in_order(token: np.ndarray, *arrays: np.ndarray) -> Any:
        results = function(*arrays)
        return (*results, token) if several else (results, token)

    dtypes = [*(dtypes if several else [dtypes]), tf.int64]
    *results, token = tf.numpy_function(
        called_by_a_graph(in_order), [_token(), *inputs], dtypes, stateful=True
    )
    _tokens[tf.compat.v1.get_default_graph()] = tf.ensure_shape(token, ())
    return results if several else results[0]


def _is_finite(array: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(array, array)))


def _size(tensor: Any) -> Any:
    size = tensor.shape.num_elements()
    return tf.size(tensor) if size is None else size


def _ranks(who: list[int]) -> str:
    return ("rank " if len(who) == 1 else "ranks ") + " ".join(map(str, who))


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-120:]}"
