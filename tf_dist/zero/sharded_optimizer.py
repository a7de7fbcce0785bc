"""The optimizer step of one shard of the flat array of all weights (ZeRO, Rajbhandari et al. 2020).

A shard consists of slices: full variables, and at its ends parts of two. The optimizer is built for these, so
that its state is never longer than the shard; the step itself is that of full variables (`BlockStep`), as
an elementwise optimizer computes the same numbers for a part.

Legend: P parameters, S of them in this rank's shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dist.errors import UsageError
from tf_dist.models.meta_init import initial_value, is_deferred, materialize
from tf_dist.optim import elementwise
from tf_dist.optim.fused_optimizer import BlockStep
from tf_dist.optim.layer_lr import lr_scale_of, set_lr_scale
from tf_dist.optim.optimizers import exclude_vectors, spared
from tf_dist.parallel.flat_buffer import FlatLayout
from tf_dist.parallel.sharding import part_of
from tf_dist.parallel.tensor_shard import TensorShard, variable_shard
from tf_dist.runners.replica import as_tensor, concat


class VariableSlice(NamedTuple):
    """The slice of one variable in a shard.

    number: index of the variable in the flat array. inner: its elements, flat. variable: a Keras variable
    that holds them: the model's own if it is complete, else one of shape (len(inner),). whole: which of these
    it is.
    """

    number: int
    inner: range
    variable: Any
    whole: bool


class ShardedOptimizer:
    """One step of an elementwise optimizer on a shard of the weights.

    Args:
        optimizer: a Keras optimizer, not yet built; variables excluded from weight decay are already set.
        variables: the model's trainable variables, in the order of the flat array. With deferred
            initialization (`tf_dist.models.meta_init`) only those completely in the shard get memory.
        shard: this rank's elements of the flat array; may be empty.

    Attributes:
        stretches: the slices of the shard.
        reason: empty; see `FusedOptimizer`.
        has_all_slots: False; see `FusedOptimizer`.

    Raises:
        UsageError: on every rank: the optimizer is built already, or needs more than a shard.
    """

    reason = ""
    has_all_slots = False

    def __init__(self, optimizer: Any, variables: Sequence[Any], shard: slice) -> None:
        if optimizer.built:
            raise UsageError(
                f"optimizer {optimizer.name!r} has been built for whole variables: --strategy zero takes one "
                "that has not been, and builds it for a shard"
            )
        self.optimizer, self.shard, self.variables = optimizer, shard, list(variables)
        layout = FlatLayout([variable.shape for variable in variables])
        exclude_vectors(optimizer)
        decays = [_decays(optimizer, variable) for variable in variables]
        # A rank without a shard has an optimizer as well, which counts steps, with empty slots.
        self.stretches = [_stretch(i, variables[i], inner) for i, inner in _within(layout, shard)]
        held = [stretch.variable for stretch in self.stretches]
        if optimizer.weight_decay is not None:
            undecayed = [one.variable for one in self.stretches if not decays[one.number]]
            optimizer.exclude_from_weight_decay(var_list=undecayed)
        optimizer.build(held)
        self._refuse(variables)
        self._step = self._make_step(held)
        # One call: reading a variable from Python takes as long as many copies of a small one.
        values = [variable.value for variable in held]
        self._read = tf.function(lambda: concat(values), input_signature=[])
        self._copy_parts = tf.function(self._parts_graph, input_signature=[], autograph=False)

    def _make_step(self, held: Sequence[Any]) -> Any:
        return BlockStep(self.optimizer, held)

    def _refuse(self, variables: Sequence[Any]) -> None:
        # All ranks check all variables, so that all of them refuse.
        reason = elementwise.why_not(self.optimizer, variables)
        if reason:
            names = ", ".join(sorted(kind.__name__ for kind in elementwise.ELEMENTWISE))
            raise UsageError(
                f"--strategy zero cannot use this optimizer: {reason}, and a rank has a shard of the weights "
                f"only. Optimizers that can be used: {names}, and subclasses of yours with "
                "`elementwise = True`; without clipnorm, global_clipnorm, use_ema and gradient accumulation "
                "(--clip-norm is the Trainer's, and works). Or use --strategy allreduce"
            )

    def apply(self, gradient_S: np.ndarray, scale: float) -> None:
        """Take one step with ``scale * gradient``, this shard of the summed gradient, (S,) float32."""
        self.copy_from_model()
        self._step.apply(as_tensor(gradient_S), np.float32(scale))

    def give_back(self) -> None:
        """As in `FusedOptimizer`."""
        self._step.give_back()

    def copy_from_model(self) -> None:
        """Copy the parts of variables from the model, for instance after a checkpoint was loaded."""
        self._copy_parts()

    def _parts_graph(self) -> None:
        for one in self.stretches:
            variable = self.variables[one.number]
            if not one.whole and not is_deferred(variable):
                values = tf.reshape(variable.value, (-1,))
                assign_in_place(one.variable.value, values[one.inner.start : one.inner.stop])

    def read(self, out_S: np.ndarray) -> None:
        """Copy this shard of the weights, after the last step, to ``out``."""
        np.copyto(out_S, np.asarray(self._read()))

    # Checkpoints --------------------------------------------------------------------------------

    def slot_shards(self, place: int, slot: str) -> list[TensorShard]:
        """Shards, on this rank, of the state ``slot`` (an attribute of the optimizer) of a variable."""
        held = elementwise.slots_of(self.optimizer)[slot]
        return [
            self._as_shard(one, variable)
            for one, variable in zip(self.stretches, held, strict=True)
            if one.number == place and one.inner
        ]

    def weight_shards(self, place: int) -> list[TensorShard]:
        """The part of a variable of the model in this shard."""
        return [
            self._as_shard(one, one.variable) for one in self.stretches if one.number == place and one.inner
        ]

    def _as_shard(self, one: VariableSlice, held: Any) -> TensorShard:
        part = part_of(self.variables[one.number])
        if one.whole:
            return variable_shard(held, part)
        read = lambda: np.asarray(held.value).reshape(-1)  # noqa: E731 - as short as it can be
        return TensorShard(part, one.inner.start, one.inner.stop, read, held.assign)

    def shared_variables(self) -> list[Any]:
        """The optimizer's variables that are replicated: its scalars."""
        slots = {id(v) for slot in elementwise.slots_of(self.optimizer).values() for v in slot}
        return [variable for variable in self.optimizer.variables if id(variable) not in slots]


def _stretch(number: int, variable: Any, inner: range) -> VariableSlice:
    if len(inner) == int(np.prod(variable.shape, dtype=np.int64)):
        materialize([variable])
        return VariableSlice(number, inner, variable, whole=True)
    values = initial_value(variable).reshape(-1) if is_deferred(variable) else values_of(variable)
    part = keras.Variable(values[inner.start : inner.stop], dtype="float32", name=variable.name)
    set_lr_scale(part, lr_scale_of(variable))
    return VariableSlice(number, inner, part, whole=False)


def _decays(optimizer: Any, variable: Any) -> bool:
    """Whether a variable of the model decays; Keras cannot identify one with deferred initialization."""
    if is_deferred(variable):
        return optimizer.weight_decay is not None and all(one is not variable for one in spared(optimizer))
    return elementwise.decays(optimizer, variable)


def _within(layout: FlatLayout, shard: slice) -> list[tuple[int, range]]:
    """The variables in a shard, and their elements in it; nothing of the first one, if none."""
    found = []
    for i, (start, size) in enumerate(zip(layout.starts, layout.sizes, strict=False)):
        inner = range(max(0, shard.start - start), min(size, shard.stop - start))
        if inner:
            found.append((i, inner))
    return found or [(0, range(0))]


def values_of(variable: Any) -> np.ndarray:
    """The values of a Keras variable as a flat array: a short-lived, read-only view.

    While it exists, TensorFlow does not change the variable in place.
    """
    return np.asarray(variable.value.read_value()).reshape(-1)


def assign_in_place(variable: Any, value: Any) -> None:
    """Copy into a TensorFlow variable's memory: `assign` would make it share the memory of ``value``."""
    rank = len(variable.shape)
    if rank == 0:
        variable.assign(tf.identity(value))
        return
    tf.raw_ops.ResourceStridedSliceAssign(
        ref=variable.handle, begin=[0] * rank, end=list(variable.shape), strides=[1] * rank, value=value
    )
