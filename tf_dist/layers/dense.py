"""Dense layers divided by columns or by rows (Megatron-LM, Shoeybi et al. 2019).

A column-parallel layer makes this rank's part of the output from the whole input, a row-parallel one takes
this rank's part of the input and makes the whole output. One after the other, with an elementwise activation
between them, talk once on the way forward and once on the way back.

Legend: N rows, all axes but the last; E width of the input, D of the output, d and e what a rank has of them.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_dist.comm.base import Comm
from tf_dist.errors import UsageError
from tf_dist.layers import collectives
from tf_dist.layers.divided import divide, talks
from tf_dist.parallel.parts import Part, stretches
from tf_dist.partition import share


class ColumnParallelDense(keras.layers.Dense):
    """`keras.layers.Dense` whose units are divided among ranks: (..., E) on all -> (..., d), this rank's.

    Weights, their names and first values are those of the whole layer. The numbers are, within rounding.

    Args:
        units: D, over all ranks.
        comm: the ranks.
        groups: neighbours of D / groups units, each of which is divided: 3 for queries, keys and values.
        gather_output: return all units, (..., D), on every rank.
        kwargs: as for Dense. The activation must be elementwise.

    Raises:
        UsageError: fewer units in a group than ranks, groups that do not divide the units, or of which the
            outputs cannot be gathered.
    """

    def __init__(
        self, units: int, comm: Comm, *, groups: int = 1, gather_output: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(units, **kwargs)
        if units % groups:
            raise UsageError(f"{self.name}: {groups} groups do not divide {units} units")
        if units // groups < comm.size:
            raise UsageError(
                f"{self.name}: {units // groups} units cannot be divided among {comm.size} ranks"
            )
        if gather_output and groups > 1:
            raise UsageError(f"{self.name}: only the outputs of one group can be gathered, not of {groups}")
        self._comm, self._gather_output = comm, gather_output
        self._ranges = stretches(groups, units // groups, comm.rank, comm.size)
        self._parts = [share(units, rank, comm.size) for rank in range(comm.size)]
        divide(self, lambda _, shape: Part(shape, len(shape) - 1, self._ranges))
        talks(self)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return this rank's units, (..., d), or all."""
        own = super().call(collectives.copied(self._comm, tf.convert_to_tensor(inputs)), training=training)
        return collectives.gathered(self._comm, own, self._parts) if self._gather_output else own

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return (..., d), or (..., D)."""
        units = self.units if self._gather_output else sum(map(len, self._ranges))
        return (*input_shape[:-1], units)


class RowParallelDense(keras.layers.Dense):
    """`keras.layers.Dense` whose inputs are divided among ranks: (..., e), this rank's -> (..., D) on all.

    The bias is whole on every rank, and added once, to the sum.

    Args:
        units: D.
        comm: the ranks.
        input_width: E, over all ranks; None: all have the same.
        kwargs: as for Dense.

    Raises:
        UsageError: when it is built: the input is not this rank's part of E.
    """

    def __init__(self, units: int, comm: Comm, *, input_width: int | None = None, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self._comm, self._input_width = comm, input_width
        divide(self, lambda name, shape: self._kernel_part(shape) if name == "kernel" else None)
        talks(self)

    def build(self, input_shape: Any) -> None:
        """Make the weights for inputs of shape (..., e)."""
        comm, own = self._comm, input_shape[-1]
        self._whole = self._input_width or own * comm.size
        self._rows = share(self._whole, comm.rank, comm.size)
        if len(self._rows) != own:
            raise UsageError(
                f"{self.name}: of {self._whole} inputs rank {comm.rank} of {comm.size} has "
                f"{len(self._rows)}, not {own}: pass what a ColumnParallelDense returns"
            )
        super().build((*input_shape[:-1], self._whole))
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: own})

    def _kernel_part(self, shape: tuple[int, ...]) -> Part:
        return Part(shape, 0, (self._rows,))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the sum of all ranks' products, (..., D), plus bias."""
        partial = keras.ops.matmul(inputs, self.kernel)
        outputs = collectives.summed(self._comm, tf.convert_to_tensor(partial))
        if self.use_bias:
            outputs = keras.ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)
