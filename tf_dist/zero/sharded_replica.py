"""A replica with a sharded optimizer state: ZeRO stages 1 and 2.

Legend: P parameters, S of them in this rank's shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.comm.transport.reduction_order import slices_of_blocks
from tf_dist.optim.muon import Muon
from tf_dist.parallel.buckets import BUCKET_BYTES, divide
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.pipeline.runner import PipelineReplica
from tf_dist.runners.replica import FlatParameters, Replica, as_tensor
from tf_dist.zero.sharded_muon import ShardedMuon
from tf_dist.zero.sharded_optimizer import ShardedOptimizer, assign_in_place, values_of


class ShardedParameters(FlatParameters):
    """As `FlatParameters`, but it updates this rank's shard, and gets the others from their owners.

    A mixin, before the class that has the model; that sets ``mesh`` first.

    Attributes:
        mesh: all ranks; those of `Mesh.replicas` share the optimizer's state.
        shards: the elements of each of these ranks, (R,).
    """

    mesh: Mesh
    optimizer_step: ShardedOptimizer

    def _make_step(self) -> ShardedOptimizer:
        self.comm = self.mesh.replicas
        self.shards = slices_of_blocks(self.parameters, self.comm.size)
        step: ShardedOptimizer
        if isinstance(self.optimizer, Muon):
            step = ShardedMuon(self.optimizer, self.variables, self.shards, self.comm)
        else:
            step = ShardedOptimizer(self.optimizer, self.variables, self.own_shard)
        whole = {one.number for one in step.stretches if one.whole}
        # A part of a variable is updated in a copy, not in the model's own.
        self._others = [i for i in range(len(self.layout.sizes)) if i not in whole]
        self._writers: dict[tuple[int, ...], Any] = {}
        self._room = np.empty(0, np.float32)
        return step

    @property
    def own_shard(self) -> slice:
        """The elements of the flat array that this rank updates."""
        return self.shards[self.comm.rank]

    def apply(self, gradient: np.ndarray, scale: float) -> None:
        """Take one optimizer step of this rank's shard with ``scale * gradient``, (S,) float32."""
        self.optimizer_step.apply(gradient, scale)

    def read_shard(self, out: np.ndarray) -> None:
        """Copy this rank's shard of the weights to ``out``, (S,)."""
        self.optimizer_step.read(out)

    def write_others(self, weights: np.ndarray) -> None:
        """Set the variables that this rank's step has not changed from all weights, (P,)."""
        if self._others:
            self.write_variables(self._others, weights, 0)

    def spread(self) -> None:
        """All-gather the weights from their owners; a collective.

        In groups of variables, so that no rank needs memory for all of them twice.
        """
        starts = self.layout.starts
        for bucket in divide(self.layout.sizes, BUCKET_BYTES, BUCKET_BYTES):
            first, last = starts[bucket.start], starts[bucket.stop]
            if self._room.size < last - first:
                self._room = aligned_empty(last - first)
            room = self._room[: last - first]
            for one in self.optimizer_step.stretches:
                if one.number in bucket and one.inner:
                    start = starts[one.number] + one.inner.start - first
                    np.copyto(room[start : start + len(one.inner)], values_of(one.variable))
            gather(room, first, self.shards, self.comm)
            others = [i for i in bucket if i in self._others]
            if others:
                self.write_variables(others, room, first)

    def broadcast_initial_weights(self, comm: Comm) -> None:
        """Make every rank start with the weights of their owners; a collective."""
        self.optimizer_step.copy_from_model()  # a checkpoint has set the model's variables
        self.spread()

    def write_variables(self, numbers: Sequence[int], weights: np.ndarray, first: int) -> None:
        """Set some variables from a slice of the flat array that begins with its element ``first``."""
        key = (first, weights.size, *numbers)
        if key not in self._writers:
            self._writers[key] = self._writer(numbers, weights.size, first)
        self._writers[key](as_tensor(weights))

    def _writer(self, numbers: Sequence[int], length: int, first: int) -> Any:
        starts, shapes, variables = self.layout.starts, self.layout.shapes, self.variables

        def graph(weights: Any) -> None:
            for i in numbers:
                part = weights[starts[i] - first : starts[i + 1] - first]
                assign_in_place(variables[i].value, tf.reshape(part, shapes[i]))

        return tf.function(graph, [tf.TensorSpec((length,), tf.float32)], autograph=False)


class ShardedReplica(ShardedParameters, Replica):
    """As `Replica`, with a shard of the optimizer's state.

    Args:
        model: token ids (B, T) int32 -> logits (B, T, V).
        optimizer: an elementwise Keras optimizer, not yet built.
        rows: B, the rows of a micro-batch.
        seq_len: T.
        seed: of dropout and all other random operations of the model.
        mesh: all ranks. A collective.

    Raises:
        UsageError: on every rank: the optimizer is built already, or is not elementwise.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        rows: int,
        seq_len: int,
        seed: int,
        mesh: Mesh,
    ) -> None:
        self.mesh = mesh
        super().__init__(model, optimizer, rows, seq_len, seed)


class ShardedPipelineReplica(ShardedParameters, PipelineReplica):
    """As `PipelineReplica`, with a shard of its optimizer's state."""


def gather(room: np.ndarray, first: int, shards: Sequence[slice], comm: Comm) -> None:
    """All-gather a slice of the flat array, of which each rank has set its own part; a collective.

    Args:
        room: the buffer of the slice.
        first: index of its first element in the flat array.
        shards: the elements of each rank.
        comm: these ranks. Each sends its part to all others, as ZeRO's authors do: mostly one rank.
    """
    for owner, shard in enumerate(shards):
        start, stop = max(first, shard.start), min(first + room.size, shard.stop)
        if start < stop:
            comm.broadcast(room[start - first : stop - first], owner)
