"""ZeRO stage 3: each rank holds a shard of the weights between uses.

After Rajbhandari et al. (2020). The model is split into segments (`partition.py`). Before a segment is used
its weights are all-gathered from their owners, into a buffer that the next segment reuses. The forward pass
saves only the input of each segment; in the backward pass its weights are gathered once more, its activations
are recomputed and differentiated, and its gradients are reduce-scattered (`tf_dist.parallel.reduce_scatter`).
Random operations depend on (seed, step, micro-batch) alone, so that recomputation draws the same dropout
masks.

Layers take weights as arguments here: Keras's `StatelessScope` substitutes a tensor for a variable.

A weight that several segments use, such as a tied embedding, is gathered for each of them. Its gradient from
later segments is held back until the first one is differentiated, and added there, as TensorFlow would do in
one graph.

Legend: B rows of a micro-batch, T tokens, V vocabulary, P parameters, S of them in this rank's shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.backend.common.stateless_scope import StatelessScope

from tf_dist.comm.transport.base import Comm
from tf_dist.comm.transport.reduction_order import ALIGNED_ELEMENTS
from tf_dist.decoding.forward import CachedForward
from tf_dist.errors import UsageError
from tf_dist.models.meta_init import is_deferred, materialize
from tf_dist.parallel.flat_buffer import aligned_empty, neighbours
from tf_dist.parallel.reduce_scatter import ShardSums
from tf_dist.parallel.tensor_shard import TensorShard
from tf_dist.parallel.totals import Totals
from tf_dist.pipeline.model_partition import one_or_all
from tf_dist.runners.loss import IGNORED, loss_and_sums
from tf_dist.runners.replica import as_tensor
from tf_dist.runners.rng import foreign_draws, generator_states, random_states
from tf_dist.runners.runner import MicroBatch
from tf_dist.zero.cached_stage3 import CachedSegments
from tf_dist.zero.partition import ShardSegment, segments
from tf_dist.zero.sharded_optimizer import ShardedOptimizer, values_of
from tf_dist.zero.sharded_replica import ShardedReplica, gather

# Micro-batches that are evaluated while the weights of a segment are gathered.
EVALUATED_TOGETHER = 8


class GatheredReplica(ShardedReplica):
    """The rank's shard of weights and optimizer state, and the model's segments as functions.

    Args:
        model: functional, token ids (B, T) int32 -> logits (B, T, V); preferably with deferred
            initialization: then only this rank's shard gets memory. The weights of another model are freed:
            it cannot compute by itself any more.
        optimizer: an elementwise Keras optimizer, not yet built.
        rows: B, the rows of a micro-batch.
        seq_len: T.
        seed: of dropout and all other random operations of the model.
        mesh: all ranks; those of `Mesh.replicas` share the weights. A collective.

    Attributes:
        shards: the elements of each of these ranks, (R,).
        segments: of the model, in order.

    Raises:
        UsageError: on every rank: the optimizer is built already, or is not elementwise; the model cannot be
            cut.
    """

    @cached_property
    def functions(self) -> list[SegmentFunctions]:
        """The segments as compiled functions, in order."""
        later = [self.segments[at:] for at in range(1, len(self.segments) + 1)]
        return [SegmentFunctions(self, *pair) for pair in zip(self.segments, later, strict=True)]

    def _materialize(self) -> None:
        trained = {id(variable) for variable in self.model.trainable_variables}
        materialize([variable for variable in self.model.variables if id(variable) not in trained])

    def _make_step(self) -> ShardedOptimizer:
        self._place = {id(variable): number for number, variable in enumerate(self.variables)}
        self.segments = segments(self.model)
        self._refuse_regularized()
        step = super()._make_step()
        kept = {id(one.variable) for one in step.stretches}
        for variable in self.variables:
            if id(variable) not in kept and not is_deferred(variable):
                variable._value = None
        return step

    def _refuse_regularized(self) -> None:
        for segment in self.segments:
            for number in set(segment.numbers) - set(segment.own):
                if getattr(self.variables[number], "regularizer", None) is not None:
                    raise UsageError(
                        f"variable {self.variables[number].path} has a regularizer and is used in several "
                        "parts of the model, where it would count several times. Use --zero-stage 2"
                    )

    # For the Trainer -----------------------------------------------------------------------------

    def spread(self) -> None:
        """No-op: weights are gathered when they are needed."""

    def broadcast_initial_weights(self, comm: Comm) -> None:
        """No-op: each weight is on one rank."""

    def holds(self, variable: Any) -> bool:
        """Whether this rank has a replicated copy of a variable of the model."""
        return id(variable) not in self._place

    def shards_of(self, variable: Any) -> list[TensorShard]:
        """The shards of a weight of the model on this rank."""
        if self.holds(variable):
            return super().shards_of(variable)
        return self.optimizer_step.weight_shards(self._place[id(variable)])

    def foreign_draws(self) -> list[str]:
        """As in `Replica`, of every segment."""
        return sorted({kind for one in self.functions for kind in one.foreign_draws()})

    def states_of(self, at: int, draw: tuple[int, int]) -> np.ndarray:
        """The states of the seed generators for a segment.

        A generator of several segments, as Keras's global one may be, restarts in each of them.
        """
        states = self.random_states(draw)
        if at:
            anew = random_states(self.seed, (*draw, at), len(states))
            states = np.where(self._shared_generators[:, None], anew, states)
        return np.asarray(states)

    @cached_property
    def _shared_generators(self) -> np.ndarray:
        """Which generators are used by none of the segments or by several."""
        users = [{id(v) for v in segment.model.variables} for segment in self.segments]
        return np.array([sum(id(v) in own for own in users) != 1 for v in generator_states(self.model)])


class SegmentFunctions:
    """A segment's forward and backward, compiled, with weights as arguments.

    Args:
        replica: the owner of the segment.
        segment: the layers.
        later: the following segments. If there are none, the loss is computed.
    """

    def __init__(
        self, replica: GatheredReplica, segment: ShardSegment, later: Sequence[ShardSegment]
    ) -> None:
        self._segment, self._last = segment, not later
        self._variables = [replica.variables[number] for number in segment.numbers]
        own = {id(variable) for variable in segment.model.variables}
        every = generator_states(replica.model)
        self._generators = [(i, v) for i, v in enumerate(every) if id(v) in own or i == len(every) - 1]
        sizes = (replica.seq_len, replica.target_len)
        rows, targets = (tf.TensorSpec((replica.rows, size), tf.int32) for size in sizes)
        first = not replica.segments.index(segment)
        into = [rows if first else _spec(segment.model.inputs[0], replica.rows)]
        into += [rows] if segment.reads_rows else []
        states = tf.TensorSpec((len(every), 2), tf.int64)
        weights = [tf.TensorSpec(variable.shape, tf.float32) for variable in self._variables]
        used_again = {number for one in later for number in one.numbers}
        held = [
            spec if number in used_again else tf.TensorSpec(())
            for spec, number in zip(weights, segment.numbers, strict=True)
        ]
        out = _spec(segment.model.outputs[0], replica.rows) if later else tf.TensorSpec((0,))
        self.forward = _Traced(self._forward_graph, [states, into, weights])
        self.evaluate = _Traced(self._evaluate_graph, [into, weights])
        self.sums = _Traced(self._sums_graph, [into, targets, weights])
        self.backward = _Traced(self._backward_graph, [states, into, out, targets, weights, held])

    def foreign_draws(self) -> list[str]:
        """TensorFlow's own random operations in it, which cannot be made repeatable."""
        return foreign_draws(self.backward.function)

    def _scope(self, states: Any, weights: Any) -> StatelessScope:
        standing = list(zip(self._variables, weights, strict=True))
        if states is not None:
            standing += [(variable, tf.cast(states[i], variable.dtype)) for i, variable in self._generators]
        return StatelessScope(state_mapping=standing, initialize_variables=False)

    def takes(self, came: Any, rows_BxT: Any) -> list[Any]:
        """The inputs of the segment: activations, or rows; and the rows again, if it reads them."""
        return [came, tf.constant(rows_BxT, tf.int32)] if self._segment.reads_rows else [came]

    def _forward_graph(self, states: Any, came: list[Any], weights: Any) -> Any:
        with self._scope(states, weights):
            return self._segment.model(one_or_all(came), training=True)

    def _evaluate_graph(self, came: list[Any], weights: Any) -> Any:
        with self._scope(None, weights):
            return self._segment.model(one_or_all(came), training=False)

    def _sums_graph(self, came: list[Any], y_BxT: tf.Tensor, weights: Any) -> Any:
        with self._scope(None, weights):
            return loss_and_sums(self._segment.model, one_or_all(came), y_BxT, training=False)[1]

    def _backward_graph(
        self, states: Any, came: list[Any], wanted: Any, y_BxT: tf.Tensor, weights: Any, held: Any
    ) -> tuple[Any, Any, Any]:
        """Gradients of the input and of the weights, and the sums of the loss.

        Args:
            states: of the seed generators.
            came: the inputs.
            wanted: the gradient of the output; ignored for the last segment.
            y_BxT: targets.
            weights: of the segment.
            held: for each, its gradient from later segments; a scalar if these do not use it.
        """
        differentiable = came[0].dtype.is_floating
        sources = [came[0], *weights] if differentiable else list(weights)
        with tf.GradientTape() as tape, self._scope(states, weights):
            tape.watch(sources)
            if self._last:
                out, sums = loss_and_sums(self._segment.model, one_or_all(came), y_BxT, training=True)
                wanted = tf.ones_like(out)
                count = sums[1]
            else:
                out, sums = self._segment.model(one_or_all(came), training=True), tf.zeros(3)
                count = tf.cast(tf.math.count_nonzero(y_BxT != IGNORED), tf.float32)
            losses = self._segment.model.losses
            more = sum(losses, 0.0) * count if losses else None
        targets, given = ([out], [wanted]) if more is None else ([out, more], [wanted, tf.ones_like(more)])
        found = tape.gradient(
            targets, sources, output_gradients=given, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        back = tf.convert_to_tensor(found[0]) if differentiable else tf.zeros(0)
        parts = found[1:] if differentiable else found
        return back, [_with_held(*pair) for pair in zip(parts, held, strict=True)], sums


class _Traced:
    """A function that is traced once, on first use.

    `tf.function` would do, but TensorFlow takes those of several segments for repeated retracing of one, and
    warns.
    """

    def __init__(self, graph: Callable[..., Any], signature: Sequence[Any]) -> None:
        self._graph, self._signature = graph, signature

    @cached_property
    def function(self) -> Any:
        """Its graph."""
        return tf.function(self._graph, self._signature).get_concrete_function()

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _spec(tensor: Any, rows: int) -> tf.TensorSpec:
    return tf.TensorSpec((rows, *tensor.shape[1:]), tensor.dtype)


def _with_held(part: Any, held: Any) -> Any:
    """The gradient of a weight plus that of later segments, dense."""
    part = tf.convert_to_tensor(part)
    return held + part if held.shape.rank else part


class GatherBuffers:
    """Reusable all-gather buffer for the parameters of one segment.

    Args:
        replica: its shard, segments and ranks.
    """

    def __init__(self, replica: GatheredReplica) -> None:
        self._replica = replica
        self._plans = [self._plan(segment.numbers) for segment in replica.segments]
        self._room = aligned_empty(max(end for _, _, end in self._plans))

    def _plan(self, numbers: Sequence[int]) -> tuple[list[tuple[slice, int]], list[slice], int]:
        """Slices of the flat array with their buffer offsets, the offset of each weight, and the end."""
        layout, at = self._replica.layout, 0
        stretches, places = [], []
        for run in runs(numbers):
            first = layout.starts[run.start]
            stretches.append((slice(first, layout.starts[run.stop]), at))
            for i in run:
                places.append(slice(at + layout.starts[i] - first, at + layout.starts[i + 1] - first))
            at += -(-(layout.starts[run.stop] - first) // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS
        return stretches, places, at

    def gather(self, at: int) -> list[Any]:
        """All-gather the weights of a segment as tensors, valid until the next call; a collective."""
        replica = self._replica
        stretches, places, _ = self._plans[at]
        for stretch, place in stretches:
            room = self._room[place : place + stretch.stop - stretch.start]
            self._copy_own_shard(stretch, room)
            gather(room, stretch.start, replica.shards, replica.comm)
        return [
            as_tensor(self._room[place].reshape(replica.layout.shapes[number]))
            for number, place in zip(replica.segments[at].numbers, places, strict=True)
        ]

    def _copy_own_shard(self, stretch: slice, room: np.ndarray) -> None:
        starts = self._replica.layout.starts
        for one in self._replica.optimizer_step.stretches:
            start = starts[one.number] + one.inner.start
            if one.inner and stretch.start <= start < stretch.stop:
                np.copyto(room[start - stretch.start :][: len(one.inner)], values_of(one.variable))


def runs(numbers: Sequence[int]) -> list[range]:
    """Group consecutive numbers into ranges."""
    return [range(numbers[one.start], numbers[one.stop - 1] + 1) for one in neighbours(numbers)]


class ZeRO3Runner:
    """Forward and backward, segment by segment, with gathered weights; all of it is collective.

    If no weight is shared by segments, all micro-batches of a rank pass through a segment while its weights
    are gathered: two gathers per step, for any number of micro-batches.

    Args:
        replica: this rank's shard.
        micro_batches: M of a global batch; a rank's are `tf_dist.parallel.reduce_scatter.dealt`.
        reports_loss: whether this rank reports losses.
    """

    local_gradients = False
    gathers_weights = True

    def __init__(self, replica: GatheredReplica, micro_batches: int, reports_loss: bool) -> None:
        self.replica, self._speaks = replica, reports_loss
        self._rooms = GatherBuffers(replica)
        starts = replica.layout.starts
        # In backward order; each variable is sent at the segment of its first use.
        self._to_send: list[list[tuple[int, range]]] = [[] for _ in replica.segments]
        stretches: list[slice] = []
        for at in reversed(range(len(replica.segments))):
            for run in runs(replica.segments[at].own):
                self._to_send[at].append((len(stretches), run))
                stretches.append(slice(starts[run.start], starts[run.stop]))
        self._sums = ShardSums(replica.comm, replica.shards, micro_batches, stretches)
        shared = any(len(one.own) < len(one.numbers) for one in replica.segments)
        self._together = 1 if shared else self._sums.rounds

    @property
    def said(self) -> str:
        """As in `ModelRunner`."""
        count = len(self.replica.segments)
        said = f"weights come when they are used, in {count} segment{'s' * (count > 1)}, and go again"
        layers = self.replica.model._flatten_layers()
        exact = count == 1 and all(layer.compute_dtype == "float32" for layer in layers)
        return said if exact else f"{said}; last bits are not those of allreduce"

    def forward_backward(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `ModelRunner`."""
        for first in range(0, self._sums.rounds, self._together):
            turns = range(first, min(self._sums.rounds, first + self._together))
            mine = [batches[turn] for turn in turns if turn < len(batches)]
            came = self._forward(step, mine)
            self._backward(step, turns, mine, came, totals)

    def gradients(self) -> list[np.ndarray]:
        """The rank's shard of the sum, alone."""
        return [self._sums.result()]

    def recompute_gradients(
        self, step: int, batches: Sequence[MicroBatch], totals: Totals
    ) -> Iterator[np.ndarray]:
        """As in `ModelRunner`: the rank's shard of the sum."""
        self.forward_backward(step, batches, totals)
        yield from self.gradients()

    def _forward(self, step: int, mine: Sequence[MicroBatch]) -> list[list[Any]]:
        """The input of each segment, for each micro-batch."""
        came = [[tf.constant(one.x_BxT) for one in mine]]
        for at, functions in enumerate(self.replica.functions[:-1]):
            weights = self._rooms.gather(at)
            out = []
            for one, into in zip(mine, came[-1], strict=True):
                states = tf.constant(self.replica.states_of(at, (step, one.number)))
                out.append(functions.forward(states, functions.takes(into, one.x_BxT), weights))
            came.append(out)
        return came

    def _backward(
        self, step: int, turns: range, mine: Sequence[MicroBatch], came: list[list[Any]], totals: Totals
    ) -> None:
        wanted: list[Any] = [tf.zeros(0)] * len(mine)
        held: list[dict[int, Any]] = [{} for _ in mine]
        for at in reversed(range(len(came))):
            weights, inputs = self._rooms.gather(at), came.pop()
            for number, turn in enumerate(turns):
                gradients: dict[int, Any] = {}
                if number < len(mine):
                    one, states = mine[number], self.replica.states_of(at, (step, mine[number].number))
                    into = self.replica.functions[at].takes(inputs[number], one.x_BxT)
                    arguments = (states, into, wanted[number], one.y_BxT)
                    wanted[number], gradients, sums = self._backward_one(at, arguments, weights, held[number])
                    if at == len(self.replica.segments) - 1 and self._speaks:
                        totals.add(one.number, np.asarray(sums, np.float64))
                self._send_gradients(at, turn, gradients)
                # References held elsewhere would keep it alive while the next one is computed.
                del gradients

    def _backward_one(
        self, at: int, arguments: tuple[Any, ...], weights: list[Any], held: dict[int, Any]
    ) -> tuple[Any, dict[int, Any], Any]:
        """One micro-batch through one segment; gradients to send, by number; others are held back."""
        segment, nothing = self.replica.segments[at], tf.zeros(())
        before = [held.pop(number, nothing) for number in segment.numbers]
        states, came, wanted, y_BxT = arguments
        back, parts, sums = self.replica.functions[at].backward(
            tf.constant(states), came, wanted, tf.constant(y_BxT), weights, before
        )
        leaving = dict(zip(segment.numbers, parts, strict=True))
        held.update({number: leaving.pop(number) for number in segment.numbers if number not in segment.own})
        return back, leaving, sums

    def _send_gradients(self, at: int, turn: int, gradients: dict[int, Any]) -> None:
        for stretch, run in self._to_send[at]:
            self._sums.add(stretch, turn, [np.asarray(gradients[i]) for i in run] if gradients else [])

    # Without a gradient --------------------------------------------------------------------------

    def evaluate(self, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `ModelRunner`."""
        ranks = self.replica.comm.size
        for first in range(0, -(-totals.micro_batches // ranks), EVALUATED_TOGETHER):
            mine = batches[first : first + EVALUATED_TOGETHER]
            rows = [tf.constant(one.x_BxT) for one in mine]
            states = self._forward_to_the_last(rows)
            weights, last = self._rooms.gather(len(self.replica.segments) - 1), self.replica.functions[-1]
            for one, came in zip(mine, states, strict=True):
                sums = last.sums(last.takes(came, one.x_BxT), tf.constant(one.y_BxT), weights)
                if self._speaks:
                    totals.add(one.number, np.asarray(sums, np.float64))

    def logits(self, x_1xT: np.ndarray) -> np.ndarray:
        """As in `ModelRunner`: of a micro-batch whose first row counts."""
        outputs_BxTxV = self.outputs(np.repeat(x_1xT, self.replica.rows, axis=0))
        return np.asarray(outputs_BxTxV[0])

    def outputs(self, x_BxT: np.ndarray) -> np.ndarray:
        """As in `ModelRunner`; a collective of the ranks that share weights."""
        last = self.replica.functions[-1]
        (came,) = self._forward_to_the_last([tf.constant(x_BxT, tf.int32)])
        out = last.evaluate(last.takes(came, x_BxT), self._rooms.gather(len(self.replica.segments) - 1))
        return np.asarray(tf.cast(out, tf.float32))

    def cached_forward(self) -> CachedForward:
        """As in `ModelRunner`; a collective of the ranks that share the weights."""
        return CachedSegments(self.replica, self.replica.segments, self._rooms.gather)

    def _forward_to_the_last(self, rows: list[Any]) -> list[Any]:
        """Token ids through all segments but the last one; a collective."""
        came = rows
        for at, functions in enumerate(self.replica.functions[:-1]):
            weights = self._rooms.gather(at)
            taken = [functions.takes(*pair) for pair in zip(came, rows, strict=True)]
            came = [functions.evaluate(one, weights) for one in taken]
        return came
