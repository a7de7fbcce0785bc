"""Elementwise optimizers: each new weight depends only on its own gradient, old value and state.

Such an optimizer may update any slice of the weights, in any shape, with the same results. The update of one
variable is Keras's own `update_step`, with arrays in place of variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import keras
import tensorflow as tf

# Keras's elementwise optimizers, by class and not by name: a subclass may do anything. Lamb scales by norms
# of variables, Muon and Adafactor use matrices, LossScaleOptimizer and MultiOptimizer contain others.
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
# Reimplemented by `update`, as in Keras's base class. A subclass that overrides one is taken at its word.
BASE_METHODS = ("apply", "_backend_apply_gradients", "_clip_gradients", "_apply_weight_decay")
_ids = count()


def why_not(optimizer: Any, variables: Sequence[Any]) -> str:
    """Why a built optimizer cannot be used through `update`; empty if it can.

    Classes other than Keras's must declare that they are elementwise, by a true attribute ``elementwise``.

    Args:
        optimizer: a Keras optimizer, built for ``variables``.
        variables: the Keras variables that it updates.
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
    """The state of each weight, by attribute: lists of variables with the shapes of the weights."""
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
    """The path of an optimizer variable that is neither a slot nor a scalar; or empty."""
    slots = {id(variable) for slot in slots_of(optimizer).values() for variable in slot}
    paths = [v.path for v in optimizer.variables if id(v) not in slots and tuple(v.shape) != ()]
    return paths[0] if paths else ""


def decays(optimizer: Any, variable: Any) -> bool:
    """Whether a model's variable is subject to the optimizer's weight decay."""
    return optimizer.weight_decay is not None and bool(optimizer._use_weight_decay(variable.value))


def update(
    optimizer: Any, gradient: Any, weights: Any, slots: dict[str, Any], rate: Any, decayed: Any
) -> tuple[Any, dict[str, Any]]:
    """Apply an elementwise optimizer to some weights; the optimizer itself is not changed.

    Clipping by value, loss scale and decoupled weight decay are those of Keras's base class, in its order.

    Args:
        optimizer: one that `why_not` accepts.
        gradient: a tensor of any shape.
        weights: of the same shape.
        slots: the state of these weights, of the same shape, by the names of `slots_of`.
        rate: the learning rate.
        decayed: a boolean tensor of the same shape: which weights decay; or True or False for all.

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
    # The same object except for its state: hyperparameters, iterations and attributes of a subclass.
    stand_in = object.__new__(type(optimizer))
    stand_in.__dict__.update(vars(optimizer))
    stand_in.__dict__.update({name: [state] for name, state in states.items()})
    stand_in.__dict__["_trainable_variables_indices"] = {variable._unique_id: 0}
    stand_in.update_step(gradient, variable, rate)
    return variable.array, {name: state.array for name, state in states.items()}


class ArrayVariable:
    """A tensor that stands in for a variable in `update_step`: assignment replaces the tensor.

    Args:
        array: initial value.

    Attributes:
        array: current value.
    """

    def __init__(self, array: Any) -> None:
        self.array, self.dtype, self.shape = array, array.dtype, array.shape
        self._unique_id = f"array_{next(_ids)}"

    @property
    def value(self) -> ArrayVariable:
        """As of a Keras variable: still a variable, which reflects later assignments."""
        return self

    def assign(self, value: Any) -> None:
        """Replace the value."""
        self.array = tf.convert_to_tensor(value)

    def assign_add(self, value: Any) -> None:
        """Add to the value."""
        self.array = self.array + value

    def assign_sub(self, value: Any) -> None:
        """Subtract from the value."""
        self.array = self.array - value

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Any:
        return tf.convert_to_tensor(self.array, dtype=dtype, name=name)


def _add_operators() -> None:
    """Give `ArrayVariable` the arithmetic of its tensor."""
    pairs = ("add", "sub", "mul", "truediv", "pow")
    names = [f"__{side}{pair}__" for pair in pairs for side in ("", "r")]
    for name in [*names, "__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__", "__getitem__"]:

        def operator(self: ArrayVariable, *others: Any, name: str = name) -> Any:
            return getattr(self.array, name)(*others)

        setattr(ArrayVariable, name, operator)


_add_operators()
