"""A rank of a pipeline: it has some layers, and micro-batches go through them from rank to rank.

`PipelineReplica` is what the rank has of the model; `PipelinePasses` runs its instructions of a schedule
(`tf_dist.parallel.schedule`), with activations and their gradients as messages between neighbours.

Legend: B rows of a micro-batch, T tokens, V vocabulary, P parameters of this rank, p ranks of the pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.config import Config, default
from tf_dist.errors import UsageError
from tf_dist.models.outline import materialize
from tf_dist.parallel.flat import aligned_empty, neighbours
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.messages import Messages
from tf_dist.parallel.schedule import B, F, Instruction, Message, W, chunks_of, schedule
from tf_dist.parallel.totals import Totals
from tf_dist.parallel.tree import BlockSum, subtrees
from tf_dist.training.graph_cuts import Values, bytes_of
from tf_dist.training.loss import IGNORED
from tf_dist.training.passes import MicroBatch
from tf_dist.training.randomness import foreign_draws, generator_states, random_states
from tf_dist.training.replica import Weights, as_tensor, check_model
from tf_dist.training.segments import LayerGraph, Segment, choose
from tf_dist.training.stage import Given, Stage, Way

# Micro-batches that are evaluated before senders wait for receivers, for each rank: activations that nobody
# has taken yet may not fill the memory of a rank that is ahead.
EVALUATED_AT_ONCE = 4


@dataclass(frozen=True)
class Pipeline:
    """How a model is run by a pipeline; the names are those of `tf_dist.config.Config`.

    Attributes:
        pipeline_schedule: see `tf_dist.parallel.schedule.schedule`.
        pipeline_cuts: layers with which stages begin, as in "2,4"; empty: stages of equal cost.
        virtual_stages: stages of each rank, with the interleaved schedule.
        micro_batches_in_flight: of which a rank keeps activations at most; 0: as the schedule has it.
        recompute: "on": keep a stage's input only, and compute the rest again on the way back.
    """

    pipeline_schedule: str = default("pipeline_schedule")
    pipeline_cuts: str = default("pipeline_cuts")
    virtual_stages: int = default("virtual_stages")
    micro_batches_in_flight: int = default("micro_batches_in_flight")
    recompute: str = default("recompute")

    def streams(self, ranks: int, micro_batches: int) -> list[list[Instruction]]:
        """What each rank computes in a step, (p,)."""
        limit = self.micro_batches_in_flight
        return schedule(self.pipeline_schedule, ranks, micro_batches, self.virtual_stages, limit)

    def chunks(self, ranks: int) -> int:
        """Into how many segments the model is cut."""
        return chunks_of(self.pipeline_schedule, ranks, self.virtual_stages)


def options_of(config: Config) -> dict[str, Any]:
    """The options of a run's pipeline, as a Trainer takes them."""
    return {field.name: getattr(config, field.name) for field in fields(Pipeline)}


class PipelineReplica(Weights):
    """Some segments of a model, with their weights and nothing of the others.

    Args:
        model: functional or sequential, token ids (B, T) int32 -> logits (B, T, V), best an outline
            (`tf_dist.models.outline`): of that, only this rank's weights are made.
        optimizer: any Keras optimizer.
        mesh: all ranks.
        rows: B.
        seq_len: T.
        seed: of dropout and everything else that is random in the model.
        options: how the model is run.
        micro_batches: of a step, on this rank's place along the data axis.

    Attributes:
        stages: of this rank, by chunk.
        runs: for each chunk, where its variables lie in the rank's flat gradient, as few slices as possible.
        chunks: of the whole pipeline.
        shared: weights that other ranks have as well (tied embeddings): where they lie, and all their ranks.

    Raises:
        UsageError: the model cannot be cut as wanted.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        mesh: Mesh,
        rows: int,
        seq_len: int,
        seed: int,
        options: Pipeline,
        micro_batches: int,
    ) -> None:
        self.model, self.mesh, self.seed, self.options = model, mesh, seed, options
        self.rows, self.seq_len, self.xla = rows, seq_len, False
        graph = LayerGraph(model)
        check_model(model)
        ranks, rank = mesh.pipeline.size, mesh.pipeline.rank
        self.chunks = options.chunks(ranks)
        cuts = choose(graph, self.chunks, options.pipeline_cuts)
        segments = graph.segments(cuts)
        mine = range(rank, self.chunks, ranks)
        self._held = {id(v) for chunk in mine for v in segments[chunk].variables}
        materialize([v for chunk in mine for v in segments[chunk].variables])
        self._refuse_weights_of_two_chunks([segments[chunk] for chunk in mine])
        trained = {id(v) for chunk in mine for v in segments[chunk].trainable}
        super().__init__(optimizer, [v for v in model.trainable_variables if id(v) in trained])
        holders = self._holders(segments, ranks)
        self.tied = [v for v in model.trainable_variables if len(holders[id(v)]) > 1]
        self.shared = self._find_shared(holders)
        self._generators = generator_states(model)
        stream = options.streams(ranks, max(1, micro_batches))[rank]
        self.stages: dict[int, Stage] = {}
        self.runs: dict[int, list[slice]] = {}
        for chunk in mine:
            shape = (
                rows,
                *(size or seq_len for size in ([graph.input, *(c.tensor for c in cuts)][chunk].shape[1:])),
            )
            self._make_stage(chunk, segments[chunk], shape, stream)

    def _make_stage(
        self, chunk: int, segment: Segment, shape: tuple[int, ...], stream: list[Instruction]
    ) -> None:
        last = chunk == self.chunks - 1
        way = Way(
            first=chunk == 0,
            last=last,
            split=any(one.kind == W for one in stream),
            recompute=self.options.recompute == "on",
            at_once=last and _back_at_once(stream, chunk),
        )
        places = [self._place(variable) for variable in segment.trainable]
        groups = neighbours(places)
        starts = self.layout.starts
        self.runs[chunk] = [
            slice(starts[places[group.start]], starts[places[group.stop - 1] + 1]) for group in groups
        ]
        self.stages[chunk] = Stage(segment, self._generators, shape, self.seq_len, way, groups)

    def _place(self, variable: Any) -> int:
        return next(place for place, one in enumerate(self.variables) if one is variable)

    def _refuse_weights_of_two_chunks(self, segments: Sequence[Segment]) -> None:
        seen = set[int]()
        for variable in (v for segment in segments for v in segment.trainable):
            if id(variable) in seen:
                raise UsageError(
                    f"weight {variable.path} is used in two stages of one rank: choose other "
                    "--pipeline-cuts, or another schedule than interleaved"
                )
            seen.add(id(variable))

    def _holders(self, segments: Sequence[Segment], ranks: int) -> dict[int, set[int]]:
        """The ranks that have a weight, by its identity."""
        holders: dict[int, set[int]] = {}
        for chunk, segment in enumerate(segments):
            for variable in segment.trainable:
                holders.setdefault(id(variable), set()).add(chunk % ranks)
        return holders

    def _find_shared(self, holders: Mapping[int, set[int]]) -> list[tuple[slice, list[int]]]:
        found = []
        for place, variable in enumerate(self.variables):
            if len(holders[id(variable)]) > 1:
                if variable.regularizer is not None:
                    raise UsageError(
                        f"weight {variable.path} is used in several stages and has a regularizer, which "
                        "would count in each: untie it (--no-tie-embeddings), or leave the regularizer out"
                    )
                where = slice(self.layout.starts[place], self.layout.starts[place + 1])
                found.append((where, sorted(holders[id(variable)])))
        return found

    def holds(self, variable: Any) -> bool:
        """Whether this rank has a weight of the model."""
        return id(variable) in self._held

    def complete(self, gradient: np.ndarray) -> np.ndarray:
        """Add what other ranks of the pipeline have for the same weights, in rank order.

        The gradient may lie in memory that ranks share: it is only read.
        """
        if not self.shared:
            return gradient
        whole, comm = aligned_empty(self.parameters), self.mesh.pipeline
        np.copyto(whole, gradient)
        for where, ranks in self.shared:
            others = [rank for rank in ranks if rank != comm.rank]
            parts = {rank: np.empty(where.stop - where.start, np.float32) for rank in others}
            under_way = [comm.irecv(part, rank, self._tag) for rank, part in parts.items()]
            under_way += [comm.isend(gradient[where], rank, self._tag) for rank in others]
            for message in under_way:
                message.wait()
            parts[comm.rank] = gradient[where]
            whole[where] = parts[ranks[0]]
            for rank in ranks[1:]:
                whole[where] += parts[rank]
        return whole

    @property
    def _tag(self) -> int:
        """Of gradients of shared weights: behind those of activations."""
        return 2 * self.chunks

    def random_states(self, draw: tuple[int, int]) -> np.ndarray:
        """The states of the whole model's generators for a (step, micro-batch)."""
        return random_states(self.seed, draw, len(self._generators))

    def foreign_draws(self) -> list[str]:
        """TensorFlow's random operations in this rank's stages."""
        return sorted({kind for stage in self.stages.values() for kind in foreign_draws(stage.traced)})


@dataclass
class Spent:
    """A rank's last step. elapsed_s: from its first instruction to its last; waited_s: for messages."""

    elapsed_s: float = 0.0
    waited_s: float = 0.0


class PipelinePasses:
    """A rank of a pipeline with its micro-batches.

    Args:
        replica: what the rank has.
        leaves: of the tree over which gradients are summed.
        block: this rank's.
        buffers: says where its terms belong, (P,) each (`Comm.term_buffers`); None: anywhere.

    Attributes:
        spent: time of the last step.
        kept_bytes: activations kept now; peak_kept_bytes: at most so far. Weights are not among them.
        said: a line for people.
    """

    by_rank = True

    def __init__(
        self,
        replica: PipelineReplica,
        leaves: range,
        block: range,
        buffers: Callable[[], list[np.ndarray]] | None,
    ) -> None:
        self.replica, self._buffers = replica, buffers
        self._terms = len(subtrees(leaves, block))
        self._flat: list[np.ndarray] = []
        self._sums = {
            chunk: [BlockSum(run.stop - run.start, leaves, block, partial(self._homes, run)) for run in runs]
            for chunk, runs in replica.runs.items()
        }
        self._messages = Messages(replica.mesh.pipeline, replica.chunks)
        self._kept: dict[tuple[int, int], Values] = {}
        self._bytes: dict[tuple[int, int], int] = {}
        self.spent, self.kept_bytes, self.peak_kept_bytes = Spent(), 0, 0
        self._run = {F: self._forward, B: self._backward, W: self._weights}
        self._step, self._given = 0, dict[int, Given]()

    @property
    def said(self) -> str:
        """A line for people: how the layers are shared out."""
        options, p = self.replica.options, self.replica.mesh.pipeline.size
        more = f", {options.virtual_stages} stages each" if self.replica.chunks > p else ""
        again = ", activations computed again" if options.recompute == "on" else ""
        return f"{p} ranks share the layers{more}, by {options.pipeline_schedule}{again}"

    # A step --------------------------------------------------------------------------------------

    def train(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `tf_dist.training.passes.Passes`."""
        begun, waited_s = time.perf_counter(), self._messages.waited_s
        comm = self.replica.mesh.pipeline
        stream = self.replica.options.streams(comm.size, len(batches))[comm.rank]
        self._step, self._given = step, {}
        self._flat = self._buffers() if self._buffers else self._flat or self._own_terms()
        self._expect(stream)
        for kind, chunk, i in stream:
            self._run[kind](chunk, i, batches[i], totals)
        self._messages.settle()
        self.spent.elapsed_s = time.perf_counter() - begun
        self.spent.waited_s = self._messages.waited_s - waited_s

    def _own_terms(self) -> list[np.ndarray]:
        return [aligned_empty(self.replica.parameters) for _ in range(self._terms)]

    def _homes(self, run: slice) -> list[np.ndarray]:
        return [term[run] for term in self._flat]

    def _expect(self, stream: Sequence[Instruction]) -> None:
        """Begin to receive the first message of each boundary."""
        for chunk, stage in self.replica.stages.items():
            kinds = [one.kind for one in stream if one.chunk == chunk]
            if not stage.way.first:
                self._messages.expect(Message(F, chunk - 1), stage.x.shape, stage.x.dtype, kinds.count(F))
            if not stage.way.last:
                self._messages.expect(Message(B, chunk + 1), stage.out_shape, stage.out_dtype, kinds.count(B))

    def _forward(self, chunk: int, i: int, batch: MicroBatch, totals: Totals) -> None:
        stage = self.replica.stages[chunk]
        x = tf.convert_to_tensor(batch.x_BxT) if stage.way.first else self._take(Message(F, chunk - 1))
        out, kept = stage.forward(x, self._brings(i, batch))
        if not stage.way.last:
            self._messages.send(Message(F, chunk), np.asarray(out))
        elif out is not None:
            self._count(batch, out, totals)
        self._keep(chunk, i, kept)

    def _backward(self, chunk: int, i: int, batch: MicroBatch, totals: Totals) -> None:
        stage = self.replica.stages[chunk]
        dy = None if stage.way.last else self._take(Message(B, chunk + 1))
        dx, sums, gradients, kept = stage.backward(self._kept[chunk, i], dy)
        if dx is not None:
            self._messages.send(Message(B, chunk), np.asarray(dx))
        if sums is not None:
            self._count(batch, sums, totals)
        self._keep(chunk, i, kept)
        self._add(chunk, gradients)

    def _weights(self, chunk: int, i: int, batch: MicroBatch, totals: Totals) -> None:
        gradients = self.replica.stages[chunk].weights(self._kept[chunk, i])
        self._keep(chunk, i, {})
        self._add(chunk, gradients)

    def _take(self, message: Message) -> Any:
        array = self._messages.take(message)
        return as_tensor(array) if array.dtype == np.float32 else tf.convert_to_tensor(array)

    def _brings(self, i: int, batch: MicroBatch) -> Given:
        """What a micro-batch brings along, made once for all stages of this rank."""
        if i not in self._given:
            count = np.float32(np.count_nonzero(batch.y_BxT != IGNORED))
            states = self.replica.random_states((self._step, batch.number))
            given = (batch.y_BxT, count, states)
            self._given[i] = Given(*(tf.convert_to_tensor(one) for one in given))
        return self._given[i]

    def _count(self, batch: MicroBatch, sums: Any, totals: Totals) -> None:
        if self.replica.mesh.speaks:
            totals.add(batch.number, np.asarray(sums, np.float64))

    def _add(self, chunk: int, gradients: Sequence[Any]) -> None:
        """Add the gradients of a micro-batch's weights, where this pass has made them."""
        for total, gradient in zip(self._sums[chunk] if gradients else [], gradients, strict=True):
            total.add(np.asarray(gradient))

    def _keep(self, chunk: int, i: int, kept: Values) -> None:
        now = bytes_of(kept)
        self.kept_bytes += now - self._bytes.pop((chunk, i), 0)
        self.peak_kept_bytes = max(self.peak_kept_bytes, self.kept_bytes)
        self._kept.pop((chunk, i), None)
        if kept:
            self._kept[chunk, i], self._bytes[chunk, i] = kept, now

    def terms(self) -> list[np.ndarray]:
        """As in `tf_dist.training.passes.Passes`."""
        if self._terms:
            for total in (total for totals in self._sums.values() for total in totals):
                total.terms()  # they end at home: in these arrays
        return list(self._flat)

    def again(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> Iterator[np.ndarray]:
        """As in `tf_dist.training.passes.Passes`."""
        self.train(step, batches, totals)
        yield from self.terms()

    # Forward only --------------------------------------------------------------------------------

    def evaluate(self, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `tf_dist.training.passes.Passes`."""
        comm = self.replica.mesh.pipeline
        for group in _groups(batches, EVALUATED_AT_ONCE * comm.size):
            stream = self.replica.options.streams(comm.size, len(group))[comm.rank]
            stream = [one for one in stream if one.kind == F]
            self._expect(stream)
            for _, chunk, i in stream:
                stage = self.replica.stages[chunk]
                x = group[i].x_BxT if stage.way.first else self._take(Message(F, chunk - 1))
                out = stage.evaluate(x, group[i].y_BxT)
                if stage.way.last:
                    self._count(group[i], out, totals)
                else:
                    self._messages.send(Message(F, chunk), np.asarray(out))
            self._messages.settle()

    def logits(self, x_1xT: np.ndarray) -> np.ndarray:
        """As in `tf_dist.training.passes.Passes`; a collective of the pipeline."""
        x, out = tf.convert_to_tensor(x_1xT, tf.int32), None
        for chunk, stage in self.replica.stages.items():
            if not stage.way.first:
                message = Message(F, chunk - 1)
                self._messages.expect(message, (1, *stage.x.shape[1:]), stage.x.dtype, 1)
                x = self._take(message)
            out = np.asarray(stage.logits(x))
            if not stage.way.last:
                self._messages.send(Message(F, chunk), out)
        comm = self.replica.mesh.pipeline
        shape = (self.replica.seq_len, self.replica.model.outputs[0].shape[-1])
        logits = np.empty(shape, np.float32)
        if comm.rank == comm.size - 1:
            assert out is not None
            np.copyto(logits, out[0])
        self._messages.settle()
        comm.broadcast(logits.reshape(-1), comm.size - 1)
        return logits


def _back_at_once(stream: Sequence[Instruction], chunk: int) -> bool:
    """Whether every forward pass of a chunk is followed by its backward pass."""
    followed = {before for before, after in pairwise(stream) if after == before._replace(kind=B)}
    return all(one in followed for one in stream if one.kind == F and one.chunk == chunk)


def _groups(batches: Sequence[MicroBatch], size: int) -> Iterator[Sequence[MicroBatch]]:
    for start in range(0, len(batches), size):
        yield batches[start : start + size]
