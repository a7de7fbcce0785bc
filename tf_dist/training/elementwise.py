"""Elementwise optimizers: each new weight depends on its own gradient, old value and state, on nothing else.

Such an optimizer may step any stretch of the weights, in any shape, and gives the same numbers. What it does
to one variable is asked of Keras's own `update_step`, with arrays in place of variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import keras
import tensorflow as tf

# Keras's elementwise optimizers, by class and not by name: a subclass may do anything. Lamb scales by norms
# of variables, Muon and Adafactor look at matrices, LossScaleOptimizer and MultiOptimizer contain others.
ELEMENTWISE = frozenset(
    getattr(keras.optimizers, name)
    for name in (
        "SGD",
        "RMSprop",
        "Adam",
        "AdamW",
        "Adamax",
        "Nadam",
        "Adagrad",
        "Adadelta",
        "Ftrl",
        "Lion",
        "ScheduleFreeAdamW",
    )
    if hasattr(keras.optimizers, name)
)
# What `update` does itself, as Keras's base class does it. A subclass with another one is taken at its word.
BASE_METHODS = ("apply", "_backend_apply_gradients", "_clip_gradients", "_apply_weight_decay")
_ids = count()


def why_not(optimizer: Any, variables: Sequence[Any]) -> str:
    """Why a built optimizer cannot be used through `update`; empty if it can.

    Classes other than Keras's must say that they are elementwise, by a true attribute ``elementwise``.

    Args:
        optimizer: a Keras optimizer, built for ``variables``.
        variables: the Keras variables that it changes.
    """
    kind = type(optimizer)
    if kind not in ELEMENTWISE and getattr(optimizer, "elementwise", False) is not True:
        return f"{kind.__name__} is not known to be elementwise"
    base: Any = keras.optimizers.Optimizer
    own = [name for name in BASE_METHODS if getattr(kind, name) is not getattr(base, name)]
    once_a_step = (base._backend_update_step, keras.optimizers.Nadam._backend_update_step)
    if kind._backend_update_step not in once_a_step:
        own.append("_backend_update_step")
    if own:
        return f"{kind.__name__} has a method {own[0]} of its own"
    for option in ("clipnorm", "global_clipnorm", "use_ema", "gradient_accumulation_steps"):
        if getattr(optimizer, option):
            return f"{kind.__name__} was given {option}"
    for variable in variables:
        if variable.constraint is not None:
            return f"variable {variable.path} has a constraint"
        if variable.overwrite_with_gradient:
            return f"variable {variable.path} is overwritten with its gradient"
    foreign = _foreign_state(optimizer)
    return f"{kind.__name__} keeps {foreign}, which belongs to no single weight" if foreign else ""


def slots_of(optimizer: Any) -> dict[str, list[Any]]:
    """The state of each weight, by attribute: lists of variables shaped as those that are trained."""
    shapes = [(tuple(variable.shape), variable.dtype) for variable in optimizer._trainable_variables]
    own = {id(variable) for variable in optimizer.variables}
    return {
        name: list(value)
        for name, value in vars(optimizer).items()
        if name not in ("_trainable_variables", "_variables")
        and isinstance(value, list | tuple)
        and all(id(variable) in own for variable in value)
        and [(tuple(variable.shape), variable.dtype) for variable in value] == shapes
    }


def _foreign_state(optimizer: Any) -> str:
    """The path of a variable of the optimizer that is neither a slot nor a single number; or nothing."""
    slots = {id(variable) for slot in slots_of(optimizer).values() for variable in slot}
    paths = [v.path for v in optimizer.variables if id(v) not in slots and tuple(v.shape) != ()]
    return paths[0] if paths else ""


def decays(optimizer: Any, variable: Any) -> bool:
    """Whether a model's variable is subject to the optimizer's weight decay."""
    return optimizer.weight_decay is not None and bool(optimizer._use_weight_decay(variable.value))


def update(
    optimizer: Any, gradient: Any, weights: Any, slots: dict[str, Any], rate: Any, decayed: Any
) -> tuple[Any, dict[str, Any]]:
    """What an elementwise optimizer makes of some weights; the optimizer itself is not changed.

    Clipping by value, loss scale and decoupled weight decay are those of Keras's base class, in its order.

    Args:
        optimizer: one for which `why_not` has no objection.
        gradient: a tensor of any shape.
        weights: as large.
        slots: the state of these weights, as large, by the names of `slots_of`.
        rate: the learning rate.
        decayed: a tensor of booleans, as large: which weights decay; or True or False for all.

    Returns:
        The new weights, and the new state.
    """
    if optimizer.loss_scale_factor is not None:
        gradient = gradient / optimizer.loss_scale_factor
    (gradient,) = optimizer._clip_gradients([gradient])
    if decayed is not False:
        decay = tf.cast(optimizer.weight_decay, weights.dtype)
        less = weights - weights * decay * tf.cast(rate, weights.dtype)
        weights = less if decayed is True else tf.where(decayed, less, weights)
    variable = ArrayVariable(weights)
    states = {name: ArrayVariable(slot) for name, slot in slots.items()}
    # The same object but for its state: hyperparameters, iterations and what a subclass has added.
    stand_in = object.__new__(type(optimizer))
    stand_in.__dict__.update(vars(optimizer))
    stand_in.__dict__.update({name: [state] for name, state in states.items()})
    stand_in.__dict__["_trainable_variables_indices"] = {variable._unique_id: 0}
    stand_in.update_step(gradient, variable, rate)
    return variable.array, {name: state.array for name, state in states.items()}


class ArrayVariable:
    """A tensor that passes for a variable in `update_step`: to assign is to hold another tensor.

    Args:
        array: what it holds at first.

    Attributes:
        array: what it holds now.
    """

    def __init__(self, array: Any) -> None:
        self.array, self.dtype, self.shape = array, array.dtype, array.shape
        self._unique_id = f"array_{next(_ids)}"

    @property
    def value(self) -> ArrayVariable:
        """As of a Keras variable: still a variable, which shows what is assigned later."""
        return self

    def assign(self, value: Any) -> None:
        """Hold ``value``."""
        self.array = tf.convert_to_tensor(value)

    def assign_add(self, value: Any) -> None:
        """Hold ``value`` more."""
        self.array = self.array + value

    def assign_sub(self, value: Any) -> None:
        """Hold ``value`` less."""
        self.array = self.array - value

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Any:
        return tf.convert_to_tensor(self.array, dtype=dtype, name=name)


def _lend_operators() -> None:
    """Give `ArrayVariable` the arithmetic of the tensor that it holds."""
    pairs = ("add", "sub", "mul", "truediv", "pow")
    names = [f"__{side}{pair}__" for pair in pairs for side in ("", "r")]
    for name in [*names, "__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__", "__getitem__"]:

        def operator(self: ArrayVariable, *others: Any, name: str = name) -> Any:
            return getattr(self.array, name)(*others)

        setattr(ArrayVariable, name, operator)


_lend_operators()
