"""Muon with a sharded state: each matrix is orthonormalised by the ranks that hold a part of it.

A shard is a slice of the flat array of all weights. Momentum and AdamW are elementwise, so a rank updates its
slice; a matrix that lies in one shard is orthonormalised by its owner alone. Of those that a boundary cuts,
at most one for each of the R - 1 boundaries, the directions are all-gathered, and each of their holders
computes the whole matrix and takes its part. So every weight has the bits of one rank.

Legend: P parameters, S of them in this rank's shard, R ranks, C elements of cut matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.models.kernel_groups import groups_of
from tf_dist.optim import elementwise
from tf_dist.optim.layer_lr import lr_scale_of
from tf_dist.optim.muon import Muon, check_whole, is_matrix, orthonormal, scale_of, stepped
from tf_dist.parallel.flat_buffer import FlatLayout, aligned_empty
from tf_dist.runners.replica import as_tensor
from tf_dist.zero.sharded_optimizer import ShardedOptimizer, VariableSlice


class ShardedMuon(ShardedOptimizer):
    """`ShardedOptimizer` of a `Muon`.

    Args:
        optimizer: not built yet.
        variables: the model's trainable variables, in the order of the flat array.
        shards: the elements of each rank, (R,); kept.
        comm: the ranks; a step is a collective.

    Raises:
        UsageError: on every rank: tensor parallelism has divided a matrix.
    """

    optimizer: Muon

    def __init__(
        self, optimizer: Muon, variables: Sequence[Any], shards: Sequence[slice], comm: Comm
    ) -> None:
        self.shards, self._comm = shards, comm
        super().__init__(optimizer, variables, shards[comm.rank])

    def _refuse(self, variables: Sequence[Any]) -> None:
        check_whole(variables)

    def _make_step(self, held: Sequence[Any]) -> _Step:
        return _Step(self, FlatLayout([variable.shape for variable in self.variables]))

    def exchange(self, own_C: np.ndarray, places: Sequence[slice]) -> np.ndarray:
        """All-gather the directions of cut matrices, (C,); a collective."""
        everyone = aligned_empty(places[-1].stop)
        everyone[places[self._comm.rank]] = own_C
        self._comm.allgather(everyone, list(places))
        return everyone


class _Step:
    """The step of a shard, in two compiled functions with an exchange between them."""

    def __init__(self, owner: ShardedMuon, layout: FlatLayout) -> None:
        self._owner, self._layout = owner, layout
        cut = [i for i, variable in enumerate(owner.variables) if is_matrix(variable) and self._is_cut(i)]
        self._cut_places = _places(cut, layout, owner.shards)
        self._first = {}
        at = 0
        for i in cut:
            self._first[i] = at
            at += layout.sizes[i]
        S = sum(len(one.inner) for one in owner.stretches)
        spec = tf.TensorSpec((S,), tf.float32), tf.TensorSpec((), tf.float32)
        self._elementwise = tf.function(self._elementwise_graph, spec, autograph=False)
        self._matrices = tf.function(
            self._matrices_graph, [tf.TensorSpec((at,), tf.float32)], autograph=False
        )
        self._directions: dict[int, tf.Variable] = {
            one.number: tf.Variable(tf.zeros(len(one.inner)), trainable=False)
            for one in owner.stretches
            if is_matrix(owner.variables[one.number]) and one.inner
        }
        self._cut = cut

    def _is_cut(self, number: int) -> bool:
        start, size = self._layout.starts[number], self._layout.sizes[number]
        return not any(one.start <= start and start + size <= one.stop for one in self._owner.shards)

    def apply(self, gradient_S: tf.Tensor, scale: Any) -> None:
        """Take one step with ``scale * gradient``, (S,) float32; a collective."""
        self._elementwise(gradient_S, scale)
        own = [np.asarray(self._directions[i]) for i in self._cut if i in self._directions]
        cut_C = np.zeros(0, np.float32)
        if self._cut:
            mine = np.concatenate(own) if own else np.zeros(0, np.float32)
            cut_C = self._owner.exchange(mine, self._cut_places)
        self._matrices(as_tensor(cut_C))

    def give_back(self) -> None:
        """As in `FusedOptimizer`."""

    def _elementwise_graph(self, gradient_S: tf.Tensor, scale: Any) -> None:
        """Momentum of all, and the whole step of what is no matrix."""
        optimizer = self._owner.optimizer
        slots = elementwise.slots_of(optimizer)
        both = zip(slots["_momentums"], slots["_velocities"], strict=True)
        rate, start = tf.convert_to_tensor(optimizer.learning_rate), 0
        for one, (momentum, velocity) in zip(self._owner.stretches, both, strict=True):
            shape, stop = one.variable.shape, start + len(one.inner)
            gradient = tf.reshape(gradient_S[start:stop] * scale, shape)
            start = stop
            if one.number in self._directions:
                m, direction = optimizer.direction(gradient, momentum.value)
                self._directions[one.number].assign(tf.reshape(direction, (-1,)))
            else:
                change, m, v = optimizer.adam(gradient, momentum.value, velocity.value)
                velocity.assign(v)
                self._set(one, change, rate)
            momentum.assign(m)

    def _matrices_graph(self, cut_C: tf.Tensor) -> None:
        """The step of matrices, cut ones from the directions of all ranks."""
        owner, optimizer = self._owner, self._owner.optimizer
        rate = tf.convert_to_tensor(optimizer.learning_rate)
        for one in owner.stretches:
            if one.number not in self._directions:
                continue
            variable = owner.variables[one.number]
            if one.number in self._first:
                first = self._first[one.number]
                whole = cut_C[first : first + self._layout.sizes[one.number]]
            else:
                whole = self._directions[one.number].read_value()
            direction = tf.reshape(whole, variable.shape)
            change = orthonormal(direction, groups_of(variable), optimizer.ns_steps)
            own = tf.reshape(change, (-1,))[one.inner.start : one.inner.stop]
            self._set(one, tf.reshape(own, one.variable.shape), rate, scale_of(variable))
        optimizer._iterations.assign_add(1)

    def _set(self, one: VariableSlice, change: Any, rate: Any, scale: float = 1.0) -> None:
        optimizer = self._owner.optimizer
        decayed = elementwise.decays(optimizer, one.variable)
        own_rate = rate * lr_scale_of(one.variable) * scale
        one.variable.assign(stepped(optimizer, one.variable.value, change, own_rate, decayed))


def _places(cut: Sequence[int], layout: FlatLayout, shards: Sequence[slice]) -> list[slice]:
    """Where each rank's elements of the cut matrices are, when these stand one behind the other."""
    found, at = [], 0
    for shard in shards:
        begun = at
        for i in cut:
            start, size = layout.starts[i], layout.sizes[i]
            at += max(0, min(shard.stop, start + size) - max(shard.start, start))
        found.append(slice(begun, at))
    return found
