"""Optimizer state of many small variables in one vector, which Keras's variables show as if it were theirs.

A variable of Keras is a shell around one of TensorFlow. While its values live in the vector, the shell holds
a `Window` on them instead. Whoever reads or assigns it, a checkpoint, a callback or the sentinel, reads or
writes the vector: there is one copy, which cannot be stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.parallel.flat import FlatLayout


class FlatSlots:
    """Some variables' values, back to back in one vector.

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
        self._windows = [Window(self, *one) for one in zip(parts, layout.shapes, strict=True)]
        self.taken = False

    def take(self) -> None:
        """Move the values into the vector.

        The variables' own memory is freed: a function that was traced with it fails from now on, rather than
        going on with old values.
        """
        if self.taken:
            return
        for variable in self._variables:
            if isinstance(variable.value, Window):  # another step of the same optimizer has it
                variable.value.lender.give_back()
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


class Window:
    """A stretch of a vector that passes for a variable of its own.

    Args:
        lender: whose vector it is.
        part: the elements that are its own.
        shape: how they are shown.
    """

    def __init__(self, lender: FlatSlots, part: range, shape: Sequence[int]) -> None:
        self.lender, self._flat, self._part = lender, lender.flat, part
        self.shape, self.dtype = tf.TensorShape(shape), lender.flat.dtype

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

    # What `tf.train.Checkpoint` asks of a Keras variable, which asks its value.

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
    """Assign, where `assign` would insist on the shape, so that memory can be freed and filled again."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
