"""A model of whose weights each rank holds a shard between uses: ZeRO's third stage.

That is of Rajbhandari et al. (2020). The model is cut into segments (`cutting.py`). Before a segment is used
its weights come from the ranks that step them, into memory that the next segment uses again. On the way
forward only what goes into each segment is kept; on the way back its weights come once more, it is computed
again and differentiated, and its gradients leave for their owners (`tf_dist.parallel.scatter`). What is
random depends on (seed, step, micro-batch) alone, so that the second time drops what the first one did.

Layers take weights as arguments here: Keras's `StatelessScope` lets a tensor stand for a variable.

A weight that several segments use, as a tied embedding, is gathered for each of them. Its gradient from later
ones is held back until the first one is differentiated, and added there as TensorFlow would have done in one
graph.

Legend: B rows of a micro-batch, T tokens, V vocabulary, P parameters, S of them in this rank's shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.backend.common.stateless_scope import StatelessScope

from tf_dist.comm.base import Comm
from tf_dist.comm.sums import ALIGNED_ELEMENTS
from tf_dist.errors import UsageError
from tf_dist.models.outline import is_outline, materialize
from tf_dist.parallel.flat import aligned_empty, neighbours
from tf_dist.parallel.scatter import ShardSums
from tf_dist.parallel.totals import Totals
from tf_dist.training.cutting import Segment, segments
from tf_dist.training.loss import IGNORED, loss_and_sums
from tf_dist.training.passes import MicroBatch
from tf_dist.training.pieces import Piece
from tf_dist.training.randomness import foreign_draws, generator_states, random_states
from tf_dist.training.replica import as_tensor
from tf_dist.training.shard_step import ShardStep, values_of
from tf_dist.training.sharded import ShardedReplica, gather

# Micro-batches that are evaluated while the weights of a segment are there.
EVALUATED_TOGETHER = 8


class GatheredReplica(ShardedReplica):
    """The rank's shard of the weights and of the optimizer's state, and the model's segments as functions.

    Args:
        model: functional, token ids (B, T) int32 -> logits (B, T, V); best an outline, for this rank's shard
            is all that gets memory. Of another model the weights are taken away: it computes no more by
            itself.
        optimizer: an elementwise Keras optimizer, not yet built.
        rows: B, the rows of a micro-batch.
        seq_len: T.
        seed: of dropout and everything else that is random in the model.
        mesh: all ranks; those of `Mesh.replicas` share the weights. A collective.

    Attributes:
        shards: the elements of each of these ranks, (R,).
        segments: of the model, in order.

    Raises:
        UsageError: the optimizer is built already, or is not elementwise; the model cannot be cut.
    """

    @cached_property
    def functions(self) -> list[SegmentFunctions]:
        """The segments as compiled functions, in order."""
        later = [self.segments[at:] for at in range(1, len(self.segments) + 1)]
        return [SegmentFunctions(self, *pair) for pair in zip(self.segments, later, strict=True)]

    def _materialize(self) -> None:
        trained = {id(variable) for variable in self.model.trainable_variables}
        materialize([variable for variable in self.model.variables if id(variable) not in trained])

    def _make_step(self) -> ShardStep:
        self._place = {id(variable): number for number, variable in enumerate(self.variables)}
        self.segments = segments(self.model)
        self._refuse_regularized()
        step = super()._make_step()
        kept = {id(one.variable) for one in step.stretches}
        for variable in self.variables:
            if id(variable) not in kept and not is_outline(variable):
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

    # What the Trainer asks -----------------------------------------------------------------------

    def spread(self) -> None:
        """Nothing: weights come when they are needed."""

    def give_weights(self, comm: Comm) -> None:
        """Nothing: each weight is on one rank."""

    def holds(self, variable: Any) -> bool:
        """Whether this rank has a variable of the model as others have it."""
        return id(variable) not in self._place

    def pieces_of(self, variable: Any) -> list[Piece]:
        """What this rank holds of a weight of the model."""
        if self.holds(variable):
            return super().pieces_of(variable)
        return self.optimizer_step.weight_pieces(self._place[id(variable)])

    def foreign_draws(self) -> list[str]:
        """As of `Replica`, of every segment."""
        return sorted({kind for one in self.functions for kind in one.foreign_draws()})

    def states_of(self, at: int, draw: tuple[int, int]) -> np.ndarray:
        """The states of the seed generators for a segment.

        One that serves several segments, as Keras's global one may, begins anew in each of them.
        """
        states = self.random_states(draw)
        if at:
            anew = random_states(self.seed, (*draw, at), len(states))
            states = np.where(self._shared_generators[:, None], anew, states)
        return np.asarray(states)

    @cached_property
    def _shared_generators(self) -> np.ndarray:
        """Which generators serve none of the segments or several."""
        users = [{id(v) for v in segment.model.variables} for segment in self.segments]
        return np.array([sum(id(v) in own for own in users) != 1 for v in generator_states(self.model)])


class SegmentFunctions:
    """A segment's forward and backward, compiled, with weights as arguments.

    Args:
        replica: whose segment it is.
        segment: the layers.
        later: the segments behind it. Where there are none, the loss is taken.
    """

    def __init__(self, replica: GatheredReplica, segment: Segment, later: Sequence[Segment]) -> None:
        self._segment, self._last = segment, not later
        self._variables = [replica.variables[number] for number in segment.numbers]
        own = {id(variable) for variable in segment.model.variables}
        every = generator_states(replica.model)
        self._generators = [(i, v) for i, v in enumerate(every) if id(v) in own or i == len(every) - 1]
        came, ids = segment.model.inputs[0], tf.TensorSpec((replica.rows, replica.seq_len), tf.int32)
        into = ids if not replica.segments.index(segment) else _spec(came, replica.rows)
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
        self.sums = _Traced(self._sums_graph, [into, ids, weights])
        self.backward = _Traced(self._backward_graph, [states, into, out, ids, weights, held])

    def foreign_draws(self) -> list[str]:
        """TensorFlow's random operations in it that cannot be made repeatable."""
        return foreign_draws(self.backward.function)

    def _scope(self, states: Any, weights: Any) -> StatelessScope:
        standing = list(zip(self._variables, weights, strict=True))
        if states is not None:
            standing += [(variable, tf.cast(states[i], variable.dtype)) for i, variable in self._generators]
        return StatelessScope(state_mapping=standing, initialize_variables=False)

    def _forward_graph(self, states: Any, came: Any, weights: Any) -> Any:
        with self._scope(states, weights):
            return self._segment.model(came, training=True)

    def _evaluate_graph(self, came: Any, weights: Any) -> Any:
        with self._scope(None, weights):
            return self._segment.model(came, training=False)

    def _sums_graph(self, came: Any, y_BxT: Any, weights: Any) -> Any:
        with self._scope(None, weights):
            return loss_and_sums(self._segment.model, came, y_BxT, training=False)[1]

    def _backward_graph(
        self, states: Any, came: Any, wanted: Any, y_BxT: Any, weights: Any, held: Any
    ) -> tuple[Any, Any, Any]:
        """Gradients of what came in and of the weights, and the sums of the loss.

        Args:
            states: of the seed generators.
            came: what came in.
            wanted: the gradient of what went out; for the last segment nothing.
            y_BxT: targets.
            weights: of the segment.
            held: for each, its gradient from later segments; a single number where these do not use it.
        """
        sources = [came, *weights] if came.dtype.is_floating else list(weights)
        with tf.GradientTape() as tape, self._scope(states, weights):
            tape.watch(sources)
            if self._last:
                out, sums = loss_and_sums(self._segment.model, came, y_BxT, training=True)
                wanted = tf.ones_like(out)
                count = sums[1]
            else:
                out, sums = self._segment.model(came, training=True), tf.zeros(3)
                count = tf.cast(tf.math.count_nonzero(y_BxT != IGNORED), tf.float32)
            losses = self._segment.model.losses
            more = sum(losses, 0.0) * count if losses else None
        targets, given = ([out], [wanted]) if more is None else ([out, more], [wanted, tf.ones_like(more)])
        found = tape.gradient(
            targets, sources, output_gradients=given, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        back = tf.convert_to_tensor(found[0]) if came.dtype.is_floating else tf.zeros(0)
        parts = found[1:] if came.dtype.is_floating else found
        return back, [_with_held(*pair) for pair in zip(parts, held, strict=True)], sums


class _Traced:
    """A function that is traced when it is first needed, once.

    A `tf.function` would do, but that TensorFlow takes those of several segments for one which is traced
    again and again, and warns.
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
    """The gradient of a weight with that of later segments, dense."""
    part = tf.convert_to_tensor(part)
    return held + part if held.shape.rank else part


class Rooms:
    """Reusable all-gather buffer for the parameters of one segment.

    Args:
        replica: its shard, segments and ranks.
    """

    def __init__(self, replica: GatheredReplica) -> None:
        self._replica = replica
        self._plans = [self._plan(segment.numbers) for segment in replica.segments]
        self._room = aligned_empty(max(end for _, _, end in self._plans))

    def _plan(self, numbers: Sequence[int]) -> tuple[list[tuple[slice, int]], list[slice], int]:
        """Stretches of the flat array with their place in the room, the place of each weight, and the end."""
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
        """The weights of a segment as tensors, valid until the next call; a collective."""
        replica = self._replica
        stretches, places, _ = self._plans[at]
        for stretch, place in stretches:
            room = self._room[place : place + stretch.stop - stretch.start]
            self._put_own(stretch, room)
            gather(room, stretch.start, replica.shards, replica.comm)
        return [
            as_tensor(self._room[place].reshape(replica.layout.shapes[number]))
            for number, place in zip(replica.segments[at].numbers, places, strict=True)
        ]

    def _put_own(self, stretch: slice, room: np.ndarray) -> None:
        starts = self._replica.layout.starts
        for one in self._replica.optimizer_step.stretches:
            start = starts[one.number] + one.inner.start
            if one.inner and stretch.start <= start < stretch.stop:
                np.copyto(room[start - stretch.start :][: len(one.inner)], values_of(one.variable))


def runs(numbers: Sequence[int]) -> list[range]:
    """Numbers that follow each other as ranges."""
    return [range(numbers[one.start], numbers[one.stop - 1] + 1) for one in neighbours(numbers)]


class GatheringPasses:
    """Forward and backward, segment by segment, with weights that come and go; all of it is collective.

    Where no weight serves several segments, all micro-batches of a rank go through a segment while its
    weights are there: they come twice in a step, whatever the number of micro-batches.

    Args:
        replica: this rank's shard.
        micro_batches: M of a global batch; a rank's are `tf_dist.parallel.scatter.dealt`.
        speaks: whether this rank counts losses.
    """

    by_rank = False

    def __init__(self, replica: GatheredReplica, micro_batches: int, speaks: bool) -> None:
        self.replica, self._speaks = replica, speaks
        self._rooms = Rooms(replica)
        starts = replica.layout.starts
        # As they come on the way back; each variable leaves where it is used first.
        self._leaving: list[list[tuple[int, range]]] = [[] for _ in replica.segments]
        stretches: list[slice] = []
        for at in reversed(range(len(replica.segments))):
            for run in runs(replica.segments[at].own):
                self._leaving[at].append((len(stretches), run))
                stretches.append(slice(starts[run.start], starts[run.stop]))
        self._sums = ShardSums(replica.comm, replica.shards, micro_batches, stretches)
        shared = any(len(one.own) < len(one.numbers) for one in replica.segments)
        self._together = 1 if shared else self._sums.rounds

    @property
    def said(self) -> str:
        """As in `Passes`."""
        count = len(self.replica.segments)
        said = f"weights come when they are used, in {count} segment{'s' * (count > 1)}, and go again"
        layers = self.replica.model._flatten_layers()
        exact = count == 1 and all(layer.compute_dtype == "float32" for layer in layers)
        return said if exact else f"{said}; last bits are not those of allreduce"

    def train(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `Passes`."""
        for first in range(0, self._sums.rounds, self._together):
            turns = range(first, min(self._sums.rounds, first + self._together))
            mine = [batches[turn] for turn in turns if turn < len(batches)]
            came = self._forward(step, mine)
            self._backward(step, turns, mine, came, totals)

    def terms(self) -> list[np.ndarray]:
        """The rank's shard of the sum, alone."""
        return [self._sums.result()]

    def again(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> Iterator[np.ndarray]:
        """As in `Passes`: the rank's shard of the sum."""
        self.train(step, batches, totals)
        yield from self.terms()

    def _forward(self, step: int, mine: Sequence[MicroBatch]) -> list[list[Any]]:
        """What goes into each segment, of each micro-batch."""
        came = [[tf.constant(one.x_BxT) for one in mine]]
        for at, functions in enumerate(self.replica.functions[:-1]):
            weights = self._rooms.gather(at)
            out = []
            for one, into in zip(mine, came[-1], strict=True):
                states = tf.constant(self.replica.states_of(at, (step, one.number)))
                out.append(functions.forward(states, into, weights))
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
                    arguments = (states, inputs[number], wanted[number], one.y_BxT)
                    wanted[number], gradients, sums = self._one_back(at, arguments, weights, held[number])
                    if at == len(self.replica.segments) - 1 and self._speaks:
                        totals.add(one.number, np.asarray(sums, np.float64))
                self._leave(at, turn, gradients)
                # What others hold of it would keep it alive while the next one is computed.
                del gradients

    def _one_back(
        self, at: int, arguments: tuple[Any, ...], weights: list[Any], held: dict[int, Any]
    ) -> tuple[Any, dict[int, Any], Any]:
        """One micro-batch through one segment; gradients that leave, by number; others are held back."""
        segment, nothing = self.replica.segments[at], tf.zeros(())
        before = [held.pop(number, nothing) for number in segment.numbers]
        states, came, wanted, y_BxT = arguments
        back, parts, sums = self.replica.functions[at].backward(
            tf.constant(states), came, wanted, tf.constant(y_BxT), weights, before
        )
        leaving = dict(zip(segment.numbers, parts, strict=True))
        held.update({number: leaving.pop(number) for number in segment.numbers if number not in segment.own})
        return back, leaving, sums

    def _leave(self, at: int, turn: int, gradients: dict[int, Any]) -> None:
        for stretch, run in self._leaving[at]:
            self._sums.add(stretch, turn, [np.asarray(gradients[i]) for i in run] if gradients else [])

    # Without a gradient --------------------------------------------------------------------------

    def evaluate(self, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `Passes`."""
        ranks = self.replica.comm.size
        for first in range(0, -(-totals.micro_batches // ranks), EVALUATED_TOGETHER):
            mine = batches[first : first + EVALUATED_TOGETHER]
            states = self._to_the_last([tf.constant(one.x_BxT) for one in mine])
            weights = self._rooms.gather(len(self.replica.segments) - 1)
            for one, came in zip(mine, states, strict=True):
                sums = self.replica.functions[-1].sums(came, tf.constant(one.y_BxT), weights)
                if self._speaks:
                    totals.add(one.number, np.asarray(sums, np.float64))

    def logits(self, x_1xT: np.ndarray) -> np.ndarray:
        """As in `Passes`: of a micro-batch, of which the first row counts."""
        x_BxT = np.repeat(x_1xT, self.replica.rows, axis=0)
        (came,) = self._to_the_last([tf.constant(x_BxT, tf.int32)])
        out = self.replica.functions[-1].evaluate(came, self._rooms.gather(len(self.replica.segments) - 1))
        return np.asarray(tf.cast(out[0], tf.float32))

    def _to_the_last(self, came: list[Any]) -> list[Any]:
        """Token ids through all segments but the last one; a collective."""
        for at, functions in enumerate(self.replica.functions[:-1]):
            weights = self._rooms.gather(at)
            came = [functions.evaluate(one, weights) for one in came]
        return came
