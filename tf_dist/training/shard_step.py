"""The optimizer's step of one shard of the flat array of all weights (ZeRO, Rajbhandari et al. 2020).

A shard is made of pieces: whole variables, and at its ends parts of two. The optimizer is built for these, so
that its state is nowhere longer than the shard; the step itself is that of whole variables (`BlockStep`), for
an elementwise optimizer makes the same numbers of a part.

Legend: P parameters, S of them in this rank's shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dist.errors import UsageError
from tf_dist.models.outline import first_value, is_outline, materialize
from tf_dist.parallel.flat import FlatLayout
from tf_dist.parallel.parts import part_of
from tf_dist.training import elementwise
from tf_dist.training.optimizer_step import BlockStep
from tf_dist.training.optimizers import spare_vectors, spared
from tf_dist.training.pieces import Piece, variable_piece
from tf_dist.training.replica import as_tensor, concat


class Stretch(NamedTuple):
    """What a shard has of one variable.

    number: of the variable, in the order of the flat array. inner: its elements, as of a flat array.
    variable: a Keras variable that holds them: the model's own where it is whole, else one of shape
    (len(inner),). whole: which of these it is.
    """

    number: int
    inner: range
    variable: Any
    whole: bool


class ShardStep:
    """One step of an elementwise optimizer on a shard of the weights.

    Args:
        optimizer: a Keras optimizer, not yet built; which variables do not decay is already said.
        variables: the model's trainable variables, in the order of the flat array. Of an outline
            (`tf_dist.models.outline`) those get memory that lie wholly in the shard.
        shard: this rank's elements of the flat array; may be empty.

    Attributes:
        stretches: what the shard is made of.
        reason: empty; see `OptimizerStep`.
        whole_slots: False; see `OptimizerStep`.

    Raises:
        UsageError: the optimizer is built already, or needs more than a shard.
    """

    reason = ""
    whole_slots = False

    def __init__(self, optimizer: Any, variables: Sequence[Any], shard: slice) -> None:
        if optimizer.built:
            raise UsageError(
                f"optimizer {optimizer.name!r} has been built for whole variables: --strategy zero takes one "
                "that has not been, and builds it for a shard"
            )
        self.optimizer, self.shard, self.variables = optimizer, shard, list(variables)
        layout = FlatLayout([variable.shape for variable in variables])
        spare_vectors(optimizer)
        decays = [_decays(optimizer, variable) for variable in variables]
        # A rank without a shard has an optimizer as well, which counts steps, and slots of no elements.
        self.stretches = [_stretch(i, variables[i], inner) for i, inner in _within(layout, shard)]
        held = [stretch.variable for stretch in self.stretches]
        if optimizer.weight_decay is not None:
            undecayed = [one.variable for one in self.stretches if not decays[one.number]]
            optimizer.exclude_from_weight_decay(var_list=undecayed)
        optimizer.build(held)
        self._refuse(variables)
        self._step = BlockStep(optimizer, held)
        # One call: to read a variable from outside takes as long as to copy a small one many times.
        values = [variable.value for variable in held]
        self._read = tf.function(lambda: concat(values), input_signature=[])
        self._copy_parts = tf.function(self._parts_graph, input_signature=[], autograph=False)

    def _refuse(self, variables: Sequence[Any]) -> None:
        # All ranks look at all variables, so that all of them refuse.
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
        self.take_parts()
        self._step.apply(as_tensor(gradient_S), np.float32(scale))

    def give_back(self) -> None:
        """As of `OptimizerStep`."""
        self._step.give_back()

    def take_parts(self) -> None:
        """Let the parts of variables be those of the model, whoever has set them there."""
        self._copy_parts()

    def _parts_graph(self) -> None:
        for one in self.stretches:
            variable = self.variables[one.number]
            if not one.whole and not is_outline(variable):
                values = tf.reshape(variable.value, (-1,))
                assign_in_place(one.variable.value, values[one.inner.start : one.inner.stop])

    def read(self, out_S: np.ndarray) -> None:
        """Copy this shard of the weights, as the last step has left it, to ``out``."""
        np.copyto(out_S, np.asarray(self._read()))

    # What a checkpoint asks ----------------------------------------------------------------------

    def slot_pieces(self, place: int, slot: str) -> list[Piece]:
        """What this rank holds of the state ``slot`` (an attribute of the optimizer) of a variable."""
        held = elementwise.slots_of(self.optimizer)[slot]
        return [
            self._as_piece(one, variable)
            for one, variable in zip(self.stretches, held, strict=True)
            if one.number == place and one.inner
        ]

    def weight_pieces(self, place: int) -> list[Piece]:
        """What this shard has of a variable of the model."""
        return [
            self._as_piece(one, one.variable) for one in self.stretches if one.number == place and one.inner
        ]

    def _as_piece(self, one: Stretch, held: Any) -> Piece:
        part = part_of(self.variables[one.number])
        if one.whole:
            return variable_piece(held, part)
        read = lambda: np.asarray(held.value).reshape(-1)  # noqa: E731 - as short as it can be
        return Piece(part, one.inner.start, one.inner.stop, read, held.assign)

    def shared_variables(self) -> list[Any]:
        """The optimizer's variables that are the same on all replicas: its single numbers."""
        slots = {id(v) for slot in elementwise.slots_of(self.optimizer).values() for v in slot}
        return [variable for variable in self.optimizer.variables if id(variable) not in slots]


def _stretch(number: int, variable: Any, inner: range) -> Stretch:
    if len(inner) == int(np.prod(variable.shape, dtype=np.int64)):
        materialize([variable])
        return Stretch(number, inner, variable, whole=True)
    values = first_value(variable).reshape(-1) if is_outline(variable) else values_of(variable)
    part = keras.Variable(values[inner.start : inner.stop], dtype="float32", name=variable.name)
    return Stretch(number, inner, part, whole=False)


def _decays(optimizer: Any, variable: Any) -> bool:
    """Whether a variable of the model decays; one of an outline has nothing that Keras could know it by."""
    if is_outline(variable):
        return optimizer.weight_decay is not None and all(one is not variable for one in spared(optimizer))
    return elementwise.decays(optimizer, variable)


def _within(layout: FlatLayout, shard: slice) -> list[tuple[int, range]]:
    """Which variables lie in a shard, and which of their elements do; nothing of the first one, if none."""
    found = []
    for i, (start, size) in enumerate(zip(layout.starts, layout.sizes, strict=False)):
        inner = range(max(0, shard.start - start), min(size, shard.stop - start))
        if inner:
            found.append((i, inner))
    return found or [(0, range(0))]


def values_of(variable: Any) -> np.ndarray:
    """The values of a Keras variable as a flat array, which must only be read, and soon: nothing is copied.

    While somebody has it, TensorFlow does not change the variable in place.
    """
    return np.asarray(variable.value.read_value()).reshape(-1)


def assign_in_place(variable: Any, value: Any) -> None:
    """Copy to where a TensorFlow variable lies: `assign` would let it live in the memory of ``value``."""
    rank = len(variable.shape)
    if rank == 0:
        variable.assign(tf.identity(value))
        return
    tf.raw_ops.ResourceStridedSliceAssign(
        ref=variable.handle, begin=[0] * rank, end=list(variable.shape), strides=[1] * rank, value=value
    )
