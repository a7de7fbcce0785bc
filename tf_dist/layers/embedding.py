"""Vocabulary-parallel embedding (Megatron-LM, Shoeybi et al. 2019).

Legend: B rows, T tokens, D width, V vocabulary, v of it on this rank, N = B T.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.layers import mappings
from tf_dist.layers.partitioned_weights import divide, talks
from tf_dist.parallel.sharding import ShardSpec
from tf_dist.partition import share


class VocabularyParallelEmbedding(keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding` with V / R tokens on each of R ranks, to within one.

    Token ids (B, T) -> (B, T, D) on all ranks: each looks up its own tokens, and the sum has the bits of one
    rank, as all but one of its terms are zero. In reverse, (B, T, D) -> logits (B, T, V) on all ranks; a
    loss can avoid these (`tf_dist.layers.cross_entropy`).

    Args:
        input_dim: V, over all ranks.
        output_dim: D.
        comm: the ranks.
        kwargs: as for ReversibleEmbedding.

    Raises:
        UsageError: on every rank: fewer tokens than ranks, or ``mask_zero``.
    """

    positionwise = True

    def __init__(self, input_dim: int, output_dim: int, comm: Comm, **kwargs: Any) -> None:
        super().__init__(input_dim, output_dim, **kwargs)
        if input_dim < comm.size:
            raise UsageError(f"{self.name}: {input_dim} tokens cannot be divided among {comm.size} ranks")
        if self.mask_zero:
            raise UsageError(f"{self.name}: mask_zero is not supported where the vocabulary is divided")
        self.comm = comm
        self.parts = [share(input_dim, rank, comm.size) for rank in range(comm.size)]
        divide(self, self._part_of)
        talks(self)

    def _part_of(self, name: str, shape: tuple[int, ...]) -> ShardSpec:
        return ShardSpec(shape, 0 if name == "embeddings" else 1, (self.parts[self.comm.rank],))

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        """Return embeddings (B, T, D), or in reverse logits (B, T, V), full on every rank."""
        if reverse:
            states = mappings.copied(self.comm, tf.cast(inputs, self.compute_dtype))
            return mappings.gathered(self.comm, super().call(states, reverse=True), self.parts)
        own = self.parts[self.comm.rank]
        ids = tf.cast(inputs, tf.int32)
        here = (ids >= own.start) & (ids < own.stop)
        rows = super().call(tf.where(here, ids - own.start, 0))
        return mappings.summed(self.comm, tf.where(here[..., None], rows, tf.zeros((), rows.dtype)))
