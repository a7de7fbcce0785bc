"""Tensor-parallel LSTM: its units are partitioned among ranks.

A rank has the gates of its own units. The next time step needs all of h, so h is all-gathered in each: an
exchange of (B, H / R) per step in the forward pass, and one of (B, H) in the backward pass. The output is
full, so the layer needs no communication after the last step.

Legend: B rows, T steps, E width of the input, H units, h of them on this rank, G = 4 h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.layers import mappings
from tf_dist.layers.partitioned_weights import divide, talks
from tf_dist.models import fast_lstm
from tf_dist.models.incremental import Span
from tf_dist.parallel.sharding import ShardSpec, stretches
from tf_dist.partition import share


class ParallelLSTM(fast_lstm.LSTM):
    """`fast_lstm.LSTM` with H / R units on each of R ranks: (B, T, E) on all -> (B, T, H) on all.

    Weights, their names and initial values are those of the unpartitioned layer. Outputs are, within
    rounding.

    Args:
        units: H, over all ranks.
        comm: the ranks.
        kwargs: as for `keras.layers.LSTM`, without ``recurrent_dropout``.

    Raises:
        UsageError: on every rank: fewer units than ranks, or options with which the recurrence cannot be
            partitioned.
    """

    def __init__(self, units: int, comm: Comm, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        if units < comm.size:
            raise UsageError(f"{self.name}: {units} units cannot be divided among {comm.size} ranks")
        if self.recurrent_dropout:
            raise UsageError(f"{self.name}: recurrent_dropout is not supported where the units are divided")
        self._comm = comm
        self._parts = [share(units, rank, comm.size) for rank in range(comm.size)]
        ranges = stretches(4, units, comm.rank, comm.size)
        divide(self.cell, lambda _, shape: ShardSpec(shape, len(shape) - 1, ranges))
        talks(self)

    def inner_loop(self, sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        """Run all time steps, as in `fast_lstm.LSTM`.

        Raises:
            UsageError: on every rank: other activations than tanh and sigmoid, unroll, cuDNN or a GPU.
        """
        if not self._is_plain():
            raise UsageError(
                f"{self.name}: units can be divided on a CPU, with the activations tanh and sigmoid, and "
                "without unroll and use_cudnn"
            )
        return super().inner_loop(sequences, initial_state, mask, training=training)

    def _input_projection(self, x_TxBxE: Any, training: bool) -> Any:
        return super()._input_projection(mappings.copied(self._comm, x_TxBxE), training)

    def _adapter_product(self, a_Exr: Any, b_rxG: Any) -> Any:
        return super()._adapter_product(mappings.copied(self._comm, a_Exr), b_rxG)  # A is replicated

    def _all_steps(
        self, z_TxBxG: Any, kernel_HxG: Any, state: list[Any], mask_TxBx1: Any, training: bool
    ) -> tuple[Any, Any, Any]:
        own_state = [mappings.own_part(self._comm, state_BxH, self._parts) for state_BxH in state]
        h_TxBxH, _, c_Bxh = fast_lstm.recurrence(z_TxBxG, kernel_HxG, own_state, mask_TxBx1, self._products)
        if self.return_state or self.stateful:  # else c is not used
            c_Bxh = mappings.gathered(self._comm, c_Bxh, self._parts)
        return h_TxBxH, h_TxBxH[-1], c_Bxh

    # Incremental, as `fast_lstm.LSTM`: all of h is kept, and c of the rank's own units.
    def step(self, x_BxNxE: Any, *, cache: list[Any], span: Span) -> tuple[Any, list[Any]]:
        """As in `fast_lstm.LSTM`; a collective."""
        return super().step(x_BxNxE, cache=cache, span=span)

    def _state_units(self) -> list[int]:
        return [self.units, len(self._parts[self._comm.rank])]

    def _kept_steps(self, z_NxBxG: Any, state: list[Any], mask_NxBx1: Any) -> tuple[Any, list[Any]]:
        kernel_HxG = tf.convert_to_tensor(self.cell.recurrent_kernel)
        own_state = [mappings.own_part(self._comm, state[0], self._parts), state[1]]
        h_NxBxH, _, c_Bxh = fast_lstm.recurrence(z_NxBxG, kernel_HxG, own_state, mask_NxBx1, self._products)
        return h_NxBxH, [h_NxBxH[-1], c_Bxh]

    def _products(self, kernel_HxG: Any) -> fast_lstm.Products:
        return _SharedProducts(kernel_HxG, self._comm, self._parts)


class _SharedProducts(fast_lstm.Products):
    """The products of a rank that has some of the units, and so some columns of R."""

    def __init__(self, kernel_HxG: Any, comm: Comm, parts: list[range]) -> None:
        super().__init__(kernel_HxG)
        self._comm, self._parts = comm, parts

    def whole(self, h: Any) -> Any:
        return mappings.gathered(self._comm, h, self._parts)

    def own(self, dh: Any) -> Any:
        own = self._parts[self._comm.rank]
        return dh[..., own.start : own.stop]

    def backward(self) -> Callable[[Any], Any]:
        partial_product = super().backward()
        return lambda dz_BxG: self.own(mappings.summed(self._comm, partial_product(dz_BxG)))
