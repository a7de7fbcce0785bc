"""Attention with heads partitioned among ranks (Megatron-LM, Shoeybi et al. 2019).

Legend: B rows, T tokens, D width, H heads, h of them on this rank, G heads of keys and values.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.layers import mappings
from tf_dist.layers.dense import ColumnParallelDense, RowParallelDense
from tf_dist.layers.partitioned_weights import talks
from tf_dist.models.cross_attention import CrossAttention
from tf_dist.models.self_attention import CausalSelfAttention
from tf_dist.partition import must_divide, share


class _ParallelHeads(keras.layers.Layer):
    """The projections and dropout masks of this rank's heads; mixed with a layer that has these hooks."""

    heads: int
    kv_heads: int
    attention_dropout: keras.layers.Layer

    def __init__(self, *args: Any, comm: Comm, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        must_divide(comm.size, "heads", self.heads, "tensor_parallel")
        must_divide(comm.size, "kv_heads", self.kv_heads, "tensor_parallel")
        self._comm = comm
        self.own_heads, self.own_kv_heads = self.heads // comm.size, self.kv_heads // comm.size
        talks(self)

    def _expanding(self, units: int, groups: int = 1, **kwargs: Any) -> keras.layers.Layer:
        return ColumnParallelDense(units, self._comm, groups=groups, **kwargs)

    def _contracting(self, units: int, **kwargs: Any) -> keras.layers.Layer:
        return RowParallelDense(units, self._comm, **kwargs)

    def _replicated(self, weight: Any) -> Any:
        # Each rank's heads give a part of its gradient.
        return mappings.copied(self._comm, tf.convert_to_tensor(weight))

    def _drop(self, weights_BxhxTxT: tf.Tensor) -> Any:
        shape = tf.shape(weights_BxhxTxT)
        everyone = tf.concat([shape[:1], [self.heads], shape[2:]], axis=0)
        mask_BxHxTxT = self.attention_dropout(tf.ones(everyone, weights_BxhxTxT.dtype), training=True)
        own = share(self.heads, self._comm.rank, self._comm.size)
        return weights_BxhxTxT * mask_BxHxTxT[:, own.start : own.stop]


class ParallelSelfAttention(_ParallelHeads, CausalSelfAttention):
    """`CausalSelfAttention` with H / R heads on each of R ranks: (B, T, D) on all -> (B, T, D) on all.

    Queries, keys and values are column-parallel, the output projection is row-parallel. Attention dropout
    equals that of the unpartitioned layer: every rank draws the mask of all heads, and uses that of its own.

    Args:
        heads: H, over all ranks.
        dropout: fraction of attention weights dropped in training.
        output_stddev: standard deviation of the output projection's initial weights.
        attend: as in `CausalSelfAttention`; gets this rank's heads.
        kind: as in `CausalSelfAttention`; G / R heads of keys and values are a rank's.
        places: as in `CausalSelfAttention`.
        comm: the ranks.

    Raises:
        UsageError: on every rank: the number of ranks does not divide the heads, or those of keys and values.
    """


class ParallelCrossAttention(_ParallelHeads, CrossAttention):
    """`CrossAttention` with H / R heads on each of R ranks, as `ParallelSelfAttention`.

    Args:
        heads: H, over all ranks.
        dropout: fraction of attention weights dropped in training.
        output_stddev: standard deviation of the output projection's initial weights.
        kind: as in `CrossAttention`.
        comm: the ranks.

    Raises:
        UsageError: on every rank: the number of ranks does not divide the heads.
    """
