"""Fused optimizer step from one flat gradient, in as few operations as the optimizer allows.

An elementwise optimizer (`elementwise.py`) updates blocks of weights, each in one compiled pass: a large
variable alone and in place, small ones together as one vector (`flat_optimizer_state.py`). Muon has a step of
its own (`muon.py`). All others update each variable by itself, as Keras does.

Legend: P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.errors import UsageError
from tf_dist.optim import elementwise
from tf_dist.optim.flat_optimizer_state import FlatSlots
from tf_dist.optim.flat_step import FusedOptimizer
from tf_dist.optim.layer_lr import lr_scale_of
from tf_dist.optim.muon import Muon, MuonStep

# A variable of this many elements is a block of its own. Starting a compiled pass takes some 20 us; copying
# this many weights into a vector and out of it takes as long.
ALONE_FROM = 1 << 17
# Small variables are concatenated up to this many elements: up to this size the allocator reuses the buffer;
# larger ones are returned to the OS and zero-filled again on every step.
TOGETHER = 1 << 21
# From this many parameters on, XLA compiles the per-variable step as a whole: one pass over each weight and
# its state, where TensorFlow alone makes a pass, and a new array, for each operation. Compilation takes some
# seconds, so small models gain nothing. By size, not by a timing: XLA rounds differently, and every number of
# ranks must make the same choice.
FUSED_FROM = 8_000_000


def optimizer_step(optimizer: Any, variables: Sequence[Any]) -> FusedOptimizer:
    """The fastest step for an optimizer; the choice depends on the optimizer and the variables only.

    Args:
        optimizer: any Keras optimizer, built for ``variables``.
        variables: the Keras variables that it updates, in the order of the flat gradient.

    Raises:
        UsageError: the optimizer was built for other variables, or cannot have learning rates by layer.
    """
    if isinstance(optimizer, Muon):
        return MuonStep(optimizer, variables)
    reason = elementwise.why_not(optimizer, variables)
    if reason and any(lr_scale_of(variable) != 1 for variable in variables):
        raise UsageError(
            f"learning rates by layer need an elementwise optimizer of Keras, such as adamw, and {reason}: "
            "use another --optimizer, or leave out --layer-lr-decay and --lr-scale"
        )
    if reason:
        return VariableStep(optimizer, variables, reason)
    try:
        optimizer._check_variables_are_known(variables)
    except ValueError as error:
        raise UsageError(
            f"optimizer {optimizer.name!r} was built for other variables than this model's: make a new one "
            "for each model, and after layers have been thawed"
        ) from error
    return BlockStep(optimizer, variables)


class VariableStep(FusedOptimizer):
    """Keras's own step, for each variable separately, with all of its options.

    Args:
        optimizer: a Keras optimizer, built for ``variables``.
        variables: Keras variables, in the order of the flat gradient.
        reason: why this one was chosen.
        fused: compile the whole step by XLA; None: if the variables are large enough.
    """

    def __init__(
        self, optimizer: Any, variables: Sequence[Any], reason: str = "chosen", fused: bool | None = None
    ) -> None:
        total = sum(int(np.prod(variable.shape, dtype=np.int64)) for variable in variables)
        super().__init__(optimizer, variables, total >= FUSED_FROM if fused is None else fused)
        self.reason = reason

    def _graph(self, gradient_P: tf.Tensor, scale: Any) -> None:
        scaled_P = gradient_P * scale
        pairs = zip(self.parts, self.variables, strict=True)
        gradients = [tf.reshape(scaled_P[part.start : part.stop], one.shape) for part, one in pairs]
        self.optimizer.apply(gradients, self.variables)


class BlockStep(FusedOptimizer):
    """The step of an elementwise optimizer, in blocks of weights.

    Large variables are updated in place, with one program for all of a shape. Small ones are gathered from
    the model into a vector, so that external changes count, and the model's variables become views of its new
    values; their state stays in a vector, visible through the optimizer's variables.

    Args:
        optimizer: a Keras optimizer that `elementwise.why_not` accepts, built for ``variables``.
        variables: Keras variables, in the order of the flat gradient.
        fused: compile each block's arithmetic to one pass by XLA. It rounds a product and a sum once, not
            twice, so the last bits differ from those of Keras's own step.
        alone_from: elements from which on a variable is a block of its own. It changes no number.
    """

    def __init__(
        self, optimizer: Any, variables: Sequence[Any], fused: bool = True, alone_from: int = ALONE_FROM
    ) -> None:
        super().__init__(optimizer, variables, compiled=False)
        self._scales = [lr_scale_of(variable) for variable in variables]
        places = [optimizer._get_variable_index(variable.value) for variable in variables]
        slots = elementwise.slots_of(optimizer)
        self._slots = [{name: slot[place] for name, slot in slots.items()} for place in places]
        self._alone, self._groups = self._blocks(alone_from)
        self._flat = [
            {name: FlatSlots([self._slots[i][name] for i in group]) for name in slots}
            for group in self._groups
        ]
        # With variables as arguments, one program serves all that have the same shapes.
        self._in_place = tf.function(self._in_place_graph, jit_compile=fused, autograph=False)
        self._together = tf.function(self._together_graph, jit_compile=fused, autograph=False)

    def apply(self, gradient_P: np.ndarray | tf.Tensor, scale: Any) -> None:
        """Take one step with ``scale * gradient``, (P,) float32."""
        for slots in chain.from_iterable(group.values() for group in self._flat):
            slots.take()
        super().apply(gradient_P, scale)

    def give_back(self) -> None:
        """Return the state of small variables to the optimizer's own; `apply` takes it again."""
        for slots in chain.from_iterable(group.values() for group in self._flat):
            slots.give_back()

    def _blocks(self, alone_from: int) -> tuple[list[int], list[list[int]]]:
        """Which variables are updated alone, and which together, by index; a block has one learning rate."""
        large = [i for i, part in enumerate(self.parts) if len(part) >= alone_from]
        small = [i for i, part in enumerate(self.parts) if len(part) < alone_from]
        sizes = accumulate(len(self.parts[i]) for i in small)
        groups: dict[tuple[float, int], list[int]] = {}
        for i, size in zip(small, sizes, strict=True):
            groups.setdefault((self._scales[i], size // TOGETHER), []).append(i)
        return large, list(groups.values())

    def _rate(self, rate: Any, i: int) -> Any:
        """The learning rate of a variable: a scalar, so that the numbers do not depend on the blocks."""
        return rate if self._scales[i] == 1 else rate * self._scales[i]

    def _graph(self, gradient_P: tf.Tensor, scale: Any) -> None:
        optimizer = self.optimizer
        rate = tf.convert_to_tensor(optimizer.learning_rate)
        decays = [elementwise.decays(optimizer, variable) for variable in self.variables]
        optimizer._backend_update_step([], [], rate)  # once per step: Nadam has a running product
        for i in self._alone:
            part, slots = self.parts[i], {name: slot.value for name, slot in self._slots[i].items()}
            gradient = gradient_P[part.start : part.stop]
            variable = self.variables[i].value
            self._in_place(gradient, scale, variable, slots, self._rate(rate, i), decays[i])
        for group, flat in zip(self._groups, self._flat, strict=True):
            gradient = _joined([gradient_P[run.start : run.stop] for run in self._runs(group)])
            decayed = self._which_decay(group, decays)
            self._step_together(group, flat, gradient, scale, self._rate(rate, group[0]), decayed)
        optimizer._iterations.assign_add(1)

    def _step_together(
        self, group: list[int], flat: dict[str, FlatSlots], gradient: Any, scale: Any, rate: Any, decayed: Any
    ) -> None:
        weights = _joined([tf.reshape(self.variables[i].value, (-1,)) for i in group])
        slots = {name: slot.flat for name, slot in flat.items()}
        sizes = [len(self.parts[i]) for i in group]
        weights = self._together(gradient, scale, weights, slots, rate, decayed)
        for i, end, size in zip(group, accumulate(sizes), sizes, strict=True):
            variable = self.variables[i]
            variable.assign(tf.reshape(weights[end - size : end], variable.shape))

    def _which_decay(self, group: list[int], decays: list[bool]) -> Any:
        flags = {decays[i] for i in group}
        if len(flags) == 1:
            return flags.pop()
        return tf.constant(np.concatenate([np.full(len(self.parts[i]), decays[i]) for i in group]))

    def _runs(self, group: list[int]) -> list[range]:
        """Slices of a group's variables in the gradient, adjacent ones merged."""
        runs: list[range] = []
        for part in (self.parts[i] for i in group):
            if runs and runs[-1].stop == part.start:
                runs[-1] = range(runs[-1].start, part.stop)
            else:
                runs.append(part)
        return runs

    def _in_place_graph(
        self, gradient: Any, scale: Any, variable: Any, slots: dict[str, Any], rate: Any, decayed: bool
    ) -> None:
        gradient = tf.reshape(gradient * scale, variable.shape)
        variable.assign(self._updated(gradient, variable.read_value(), slots, rate, decayed))

    def _together_graph(
        self, gradient: Any, scale: Any, weights: Any, slots: dict[str, Any], rate: Any, decayed: Any
    ) -> Any:
        return self._updated(gradient * scale, weights, slots, rate, decayed)

    def _updated(self, gradient: Any, weights: Any, slots: dict[str, Any], rate: Any, decayed: Any) -> Any:
        """The new weights; the slots, TensorFlow variables, are assigned."""
        state = {name: slot.read_value() for name, slot in slots.items()}
        weights, state = elementwise.update(self.optimizer, gradient, weights, state, rate, decayed)
        for name, slot in slots.items():
            slot.assign(state[name])
        return weights


def _joined(vectors: list[Any]) -> Any:
    return vectors[0] if len(vectors) == 1 else tf.concat(vectors, 0)
