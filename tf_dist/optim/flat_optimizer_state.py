"""Optimizer state of many small variables in one vector, visible through Keras's variables.

A Keras variable wraps one of TensorFlow. While its values are in the vector, it wraps a `FlatView` of them
instead. A checkpoint, a callback or the consistency check that reads or assigns it accesses the vector: there
is one copy, which cannot be stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.parallel.flat_buffer import FlatLayout


class FlatSlots:
    """Values of several variables, contiguous in one vector.

    Args:
        variables: Keras variables of one dtype, of an optimizer.

    Attributes:
        flat: the vector, a TensorFlow variable; it holds the values between `take` and `give_back`.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self._variables = list(variables)
        self._own: list[Any] = []
        layout = FlatLayout([variable.shape for variable in variables])
        self.flat = tf.Variable(tf.zeros(layout.total, variables[0].dtype), trainable=False)
        _set(self.flat, tf.zeros(0, self.flat.dtype))  # no memory before it is used
        ends = accumulate(layout.sizes)
        parts = [range(end - size, end) for end, size in zip(ends, layout.sizes, strict=True)]
        self._windows = [FlatView(self, *one) for one in zip(parts, layout.shapes, strict=True)]
        self.taken = False

    def take(self) -> None:
        """Move the values into the vector.

        The variables' own memory is freed: a function that was traced with it fails from now on, instead of
        using stale values.
        """
        if self.taken:
            return
        for variable in self._variables:
            if isinstance(variable.value, FlatView):  # another step function of the same optimizer holds it
                variable.value.owner.give_back()
        self._own = [variable.value for variable in self._variables]
        _set(self.flat, tf.concat([tf.reshape(own, (-1,)) for own in self._own], 0))
        for variable, own, window in zip(self._variables, self._own, self._windows, strict=True):
            variable._value = window
            _set(own, tf.zeros(0, own.dtype))
        self.taken = True

    def give_back(self) -> None:
        """Move the values back into the variables' own memory."""
        if not self.taken:
            return
        for variable, own, window in zip(self._variables, self._own, self._windows, strict=True):
            _set(own, window.read_value())
            variable._value = own
        _set(self.flat, tf.zeros(0, self.flat.dtype))
        self.taken = False


class FlatView:
    """A slice of a vector that stands in for a variable.

    Args:
        lender: owner of the vector.
        part: its elements.
        shape: of the view.
    """

    def __init__(self, owner: FlatSlots, part: range, shape: Sequence[int]) -> None:
        self.owner, self._flat, self._part = owner, owner.flat, part
        self.shape, self.dtype = tf.TensorShape(shape), owner.flat.dtype

    def read_value(self) -> Any:
        """The values, as a tensor."""
        return tf.reshape(self._flat[self._part.start : self._part.stop], self.shape)

    def numpy(self) -> np.ndarray:
        """A copy of the values."""
        return np.array(self.read_value())

    def assign(self, value: Any) -> None:
        """Set the values."""
        tf.raw_ops.ResourceStridedSliceAssign(
            ref=self._flat.handle,
            begin=[self._part.start],
            end=[self._part.stop],
            strides=[1],
            value=tf.reshape(tf.cast(value, self.dtype), (-1,)),
        )

    def assign_add(self, value: Any) -> None:
        """Add to the values."""
        self.assign(self.read_value() + value)

    def assign_sub(self, value: Any) -> None:
        """Subtract from the values."""
        self.assign(self.read_value() - value)

    # For `tf.train.Checkpoint`, which calls these on the value of a Keras variable.

    @property
    def _shared_name(self) -> str:
        return f"{self._flat.name}_{self._part.start}"

    def _serialize_to_tensors(self) -> dict[str, Any]:
        return {"VARIABLE_VALUE": self.read_value()}

    def _restore_from_tensors(self, restored: dict[str, Any]) -> Any:
        self.assign(restored["VARIABLE_VALUE"])
        return self.read_value()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read_value(), dtype=dtype)

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Any:
        return tf.convert_to_tensor(self.read_value(), dtype=dtype, name=name)


def _set(variable: Any, value: Any) -> None:
    """Assign without `assign`'s shape check, so that memory can be freed and filled later."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
