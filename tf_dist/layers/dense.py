"""Column-parallel and row-parallel dense layers (Megatron-LM, Shoeybi et al. 2019).

A column-parallel layer computes this rank's slice of the output from the full input, a row-parallel one the
full output from this rank's slice of the input. In sequence, with an elementwise activation between them,
they communicate once in the forward and once in the backward pass.

Legend: N rows, all axes but the last; E width of the input, D of the output, d and e this rank's part of
them.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.layers import mappings
from tf_dist.layers.partitioned_weights import divide, talks
from tf_dist.parallel.sharding import ShardSpec, stretches
from tf_dist.partition import share


class ColumnParallelDense(keras.layers.Dense):
    """`keras.layers.Dense` with units partitioned among ranks: (..., E) on all -> (..., d), this rank's.

    Weights, their names and initial values are those of the unpartitioned layer. Outputs are, within
    rounding.

    Args:
        units: D, over all ranks.
        comm: the ranks.
        groups: groups of D / groups adjacent units, each of which is partitioned: 3 for queries, keys and
            values.
        gather_output: return all units, (..., D), on every rank.
        kwargs: as for Dense. The activation must be elementwise.

    Raises:
        UsageError: on every rank: fewer units in a group than ranks, groups that do not divide the units, or
            whose outputs cannot be gathered.
    """

    positionwise = True

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
        divide(self, lambda _, shape: ShardSpec(shape, len(shape) - 1, self._ranges))
        talks(self)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return this rank's units, (..., d), or all."""
        own = super().call(mappings.copied(self._comm, tf.convert_to_tensor(inputs)), training=training)
        return mappings.gathered(self._comm, own, self._parts) if self._gather_output else own

    def low_rank_product(self, inputs: Any, a: Any, b: Any) -> Any:
        """The product of an adapter (`tf_dist.models.lora`), A replicated and B divided like the kernel.

        x A is replicated, so the gradient of A is complete on every rank; that of x A is all-reduced.
        """
        low = mappings.copied(self._comm, tf.convert_to_tensor(keras.ops.matmul(inputs, a)))
        own = keras.ops.matmul(low, b)
        return mappings.gathered(self._comm, own, self._parts) if self._gather_output else own

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return (..., d), or (..., D)."""
        units = self.units if self._gather_output else sum(map(len, self._ranges))
        return (*input_shape[:-1], units)


class RowParallelDense(keras.layers.Dense):
    """`keras.layers.Dense` with inputs partitioned among ranks: (..., e), this rank's -> (..., D) on all.

    The bias is replicated, and added once, to the sum.

    Args:
        units: D.
        comm: the ranks.
        input_width: E, over all ranks; None: e is the same on all.
        kwargs: as for Dense.

    Raises:
        UsageError: on the rank, when it is built: the input is not this rank's slice of E.
    """

    positionwise = True

    def __init__(self, units: int, comm: Comm, *, input_width: int | None = None, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self._comm, self._input_width = comm, input_width
        divide(self, lambda name, shape: self._kernel_part(shape) if name == "kernel" else None)
        talks(self)

    def build(self, input_shape: Any) -> None:
        """Create the weights for inputs of shape (..., e)."""
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

    def _kernel_part(self, shape: tuple[int, ...]) -> ShardSpec:
        return ShardSpec(shape, 0, (self._rows,))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the sum of all ranks' products, (..., D), plus bias."""
        partial = keras.ops.matmul(inputs, self.kernel)
        outputs = mappings.summed(self._comm, tf.convert_to_tensor(partial))
        if self.use_bias:
            outputs = keras.ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)

    def low_rank_product(self, inputs: Any, a: Any, b: Any) -> Any:
        """The product of an adapter (`tf_dist.models.lora`), A divided like the kernel and B replicated."""
        low = mappings.summed(self._comm, tf.convert_to_tensor(keras.ops.matmul(inputs, a)))
        return keras.ops.matmul(low, b)
