"""Pipeline-parallel model runner: a rank has some layers, and micro-batches pass from rank to rank.

`PipelineReplica` is the rank's part of the model; `PipelineRunner` executes its instructions of a schedule
(`tf_dist.parallel.pipeline_schedules`), with activations and their gradients as messages between stages.

Legend: B rows of a micro-batch, T tokens, V vocabulary, P parameters of this rank, p ranks of the pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.config.pipeline import PipelineOptions
from tf_dist.decoding.forward import CachedForward
from tf_dist.errors import UsageError
from tf_dist.models.meta_init import materialize
from tf_dist.models.model_outputs import target_len
from tf_dist.parallel.flat_buffer import aligned_empty, neighbours
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.p2p import P2PChannels
from tf_dist.parallel.pipeline_schedules import B, F, Instruction, Message, W
from tf_dist.parallel.reduction_tree import BlockSum, subtrees
from tf_dist.parallel.totals import Totals
from tf_dist.pipeline.cached_pipeline import CachedPipeline
from tf_dist.pipeline.graph_partition import Values, bytes_of
from tf_dist.pipeline.model_partition import LayerGraph, ModelSegment, choose
from tf_dist.pipeline.stage import Stage, StageInputs, StageVariant
from tf_dist.runners.loss import IGNORED
from tf_dist.runners.replica import FlatParameters, as_tensor, check_model
from tf_dist.runners.rng import foreign_draws, generator_states, random_states
from tf_dist.runners.runner import MicroBatch, outputs_by_row

# Micro-batches per rank that are evaluated before senders wait for receivers: otherwise unreceived
# activations could fill the memory of a rank that runs ahead.
EVALUATED_AT_ONCE = 4


class PipelineReplica(FlatParameters):
    """The segments of a model on this rank, with their weights only.

    Args:
        model: functional or sequential, token ids (B, T) int32 -> logits (B, T, V), preferably with deferred
            initialization (`tf_dist.models.meta_init`): then only this rank's weights are created.
        optimizer: any Keras optimizer.
        mesh: all ranks.
        rows: B.
        seq_len: T.
        seed: of dropout and all other random operations of the model.
        options: of the pipeline.
        micro_batches: of a step, at this rank's coordinate along the data axis.

    Attributes:
        stages: of this rank, by chunk.
        runs: for each chunk, the slices of its variables in the rank's flat gradient, as few as possible.
        chunks: of the whole pipeline.
        shared: weights that other ranks have as well (tied embeddings): their slices, and all their ranks.

    Raises:
        UsageError: on every rank: the model cannot be cut as requested.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        mesh: Mesh,
        rows: int,
        seq_len: int,
        seed: int,
        options: PipelineOptions,
        micro_batches: int,
    ) -> None:
        self.model, self.mesh, self.seed, self.options = model, mesh, seed, options
        self.rows, self.seq_len, self.xla = rows, seq_len, False
        self.target_len = target_len(model, seq_len)
        graph = LayerGraph(model)
        check_model(model)
        ranks, rank = mesh.pipeline.size, mesh.pipeline.rank
        self.chunks = options.chunks(ranks)
        cuts = choose(graph, self.chunks, options.pipeline_cuts)
        segments = graph.segments(cuts)
        mine = range(rank, self.chunks, ranks)
        self._held = {id(v) for chunk in mine for v in segments[chunk].variables}
        materialize([v for chunk in mine for v in segments[chunk].variables])
        self._refuse_shared_across_chunks([segments[chunk] for chunk in mine])
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
        self, chunk: int, segment: ModelSegment, shape: tuple[int, ...], stream: list[Instruction]
    ) -> None:
        last = chunk == self.chunks - 1
        way = StageVariant(
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
        sizes = (self.seq_len, self.target_len)
        self.stages[chunk] = Stage(segment, self._generators, shape, *sizes, way, groups)

    def _place(self, variable: Any) -> int:
        return next(place for place, one in enumerate(self.variables) if one is variable)

    def _refuse_shared_across_chunks(self, segments: Sequence[ModelSegment]) -> None:
        seen = set[int]()
        for variable in (v for segment in segments for v in segment.trainable):
            if id(variable) in seen:
                raise UsageError(
                    f"weight {variable.path} is used in two stages of one rank: choose other "
                    "--pipeline-cuts, or another schedule than interleaved"
                )
            seen.add(id(variable))

    def _holders(self, segments: Sequence[ModelSegment], ranks: int) -> dict[int, set[int]]:
        """The ranks that have a weight, by the weight's identity."""
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
        """Add the gradients of other ranks of the pipeline for the same weights, in rank order.

        The gradient may be in shared memory: it is only read.
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
        """Tag of gradients of shared weights: after those of activations."""
        return 2 * self.chunks

    def random_states(self, draw: tuple[int, int]) -> np.ndarray:
        """The states of the full model's generators for a (step, micro-batch)."""
        return random_states(self.seed, draw, len(self._generators))

    def foreign_draws(self) -> list[str]:
        """TensorFlow's own random operations in this rank's stages."""
        return sorted({kind for stage in self.stages.values() for kind in foreign_draws(stage.traced)})


@dataclass
class StageTimes:
    """A rank's last step. elapsed_s: from its first instruction to its last; waited_s: for messages."""

    elapsed_s: float = 0.0
    waited_s: float = 0.0


class PipelineRunner:
    """Runs the micro-batches of a pipeline rank.

    Args:
        replica: the rank's part of the model.
        leaves: of the tree over which gradients are summed.
        block: this rank's.
        buffers: returns the buffers of its terms, (P,) each (`Comm.term_buffers`); None: anywhere.

    Attributes:
        spent: time of the last step.
        kept_bytes: activations saved now; peak_kept_bytes: at most so far. Weights are not included.
        said: status line.
    """

    local_gradients = True
    gathers_weights = False

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
        self._messages = P2PChannels(replica.mesh.pipeline, replica.chunks)
        self._kept: dict[tuple[int, int], Values] = {}
        self._bytes: dict[tuple[int, int], int] = {}
        self.spent, self.kept_bytes, self.peak_kept_bytes = StageTimes(), 0, 0
        self._run = {F: self._forward, B: self._backward, W: self._weights}
        self._step, self._given = 0, dict[int, StageInputs]()

    @property
    def said(self) -> str:
        """Status line: the assignment of layers to ranks."""
        options, p = self.replica.options, self.replica.mesh.pipeline.size
        more = f", {options.virtual_stages} stages each" if self.replica.chunks > p else ""
        again = ", activations computed again" if options.recompute == "on" else ""
        return f"{p} ranks share the layers{more}, by {options.pipeline_schedule}{again}"

    # A step --------------------------------------------------------------------------------------

    def forward_backward(self, step: int, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `tf_dist.runners.runner.ModelRunner`."""
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
        """Post the first receive of each boundary."""
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

    def _brings(self, i: int, batch: MicroBatch) -> StageInputs:
        """Inputs of a micro-batch besides activations, created once for all stages of this rank."""
        if i not in self._given:
            count = np.float32(np.count_nonzero(batch.y_BxT != IGNORED))
            states = self.replica.random_states((self._step, batch.number))
            given = (batch.y_BxT, count, states, batch.x_BxT)
            self._given[i] = StageInputs(*(tf.convert_to_tensor(one) for one in given))
        return self._given[i]

    def _count(self, batch: MicroBatch, sums: Any, totals: Totals) -> None:
        if self.replica.mesh.reports_loss:
            totals.add(batch.number, np.asarray(sums, np.float64))

    def _add(self, chunk: int, gradients: Sequence[Any]) -> None:
        """Add the gradients of a micro-batch's weights, if this pass has computed them."""
        for total, gradient in zip(self._sums[chunk] if gradients else [], gradients, strict=True):
            total.add(np.asarray(gradient))

    def _keep(self, chunk: int, i: int, kept: Values) -> None:
        now = bytes_of(kept)
        self.kept_bytes += now - self._bytes.pop((chunk, i), 0)
        self.peak_kept_bytes = max(self.peak_kept_bytes, self.kept_bytes)
        self._kept.pop((chunk, i), None)
        if kept:
            self._kept[chunk, i], self._bytes[chunk, i] = kept, now

    def gradients(self) -> list[np.ndarray]:
        """As in `tf_dist.runners.runner.ModelRunner`."""
        if self._terms:
            for total in (total for totals in self._sums.values() for total in totals):
                total.terms()  # the sums end in these arrays
        return list(self._flat)

    def recompute_gradients(
        self, step: int, batches: Sequence[MicroBatch], totals: Totals
    ) -> Iterator[np.ndarray]:
        """As in `tf_dist.runners.runner.ModelRunner`."""
        self.forward_backward(step, batches, totals)
        yield from self.gradients()

    # Forward only --------------------------------------------------------------------------------

    def evaluate(self, batches: Sequence[MicroBatch], totals: Totals) -> None:
        """As in `tf_dist.runners.runner.ModelRunner`."""
        comm = self.replica.mesh.pipeline
        for group in _groups(batches, EVALUATED_AT_ONCE * comm.size):
            stream = self.replica.options.streams(comm.size, len(group))[comm.rank]
            stream = [one for one in stream if one.kind == F]
            self._expect(stream)
            for _, chunk, i in stream:
                stage = self.replica.stages[chunk]
                x = group[i].x_BxT if stage.way.first else self._take(Message(F, chunk - 1))
                out = stage.evaluate(x, group[i].y_BxT, group[i].x_BxT)
                if stage.way.last:
                    self._count(group[i], out, totals)
                else:
                    self._messages.send(Message(F, chunk), np.asarray(out))
            self._messages.settle()

    def logits(self, x_1xT: np.ndarray) -> np.ndarray:
        """As in `tf_dist.runners.runner.ModelRunner`; a collective of the pipeline."""
        row = x = tf.convert_to_tensor(x_1xT, tf.int32)
        out = None
        for chunk, stage in self.replica.stages.items():
            if not stage.way.first:
                message = Message(F, chunk - 1)
                self._messages.expect(message, (1, *stage.x.shape[1:]), stage.x.dtype, 1)
                x = self._take(message)
            out = np.asarray(stage.logits(x, row))
            if not stage.way.last:
                self._messages.send(Message(F, chunk), out)
        comm = self.replica.mesh.pipeline
        own = self.replica.model.outputs[0].shape
        logits = np.empty((own[1] or self.replica.seq_len, own[2]), np.float32)
        if comm.rank == comm.size - 1:
            assert out is not None
            np.copyto(logits, out[0])
        self._messages.settle()
        comm.broadcast(logits.reshape(-1), comm.size - 1)
        return logits

    def outputs(self, x_BxT: np.ndarray) -> np.ndarray:
        """As in `tf_dist.runners.runner.ModelRunner`; a collective of the pipeline."""
        return outputs_by_row(self, x_BxT)

    def cached_forward(self) -> CachedForward:
        """As in `tf_dist.runners.runner.ModelRunner`."""
        replica = self.replica
        return CachedPipeline(replica.model, replica.stages, replica.mesh, self._messages, replica.seq_len)


def _back_at_once(stream: Sequence[Instruction], chunk: int) -> bool:
    """Whether every forward pass of a chunk is followed by its backward pass."""
    followed = {before for before, after in pairwise(stream) if after == before._replace(kind=B)}
    return all(one in followed for one in stream if one.kind == F and one.chunk == chunk)


def _groups(batches: Sequence[MicroBatch], size: int) -> Iterator[Sequence[MicroBatch]]:
    for start in range(0, len(batches), size):
        yield batches[start : start + size]
