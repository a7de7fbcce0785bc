"""A Transformer whose rows several ranks share: what it is made of on one of them.

Legend: B rows, T tokens, D width, s ranks, L = T / s.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_dist.comm.base import Comm
from tf_dist.errors import UsageError
from tf_dist.layers.ring import RingAttention
from tf_dist.models.transformer import PLAIN, Layers, LearnedPositions
from tf_dist.parallel.sequence import columns, own_chunks
from tf_dist.partition import must_divide


def sequence_parallel(comm: Comm, seq_len: int, layers: Layers = PLAIN) -> Layers:
    """What `tf_dist.models.transformer.build` makes the model of a rank from.

    All but attention is local to a token, so that only attention and positions are others. The model takes a
    rank's `columns` of a row; its weights are those of the whole model, whole, on every rank.

    Args:
        comm: the ranks that share rows, `Mesh.sequence`.
        seq_len: T.
        layers: what else is divided.

    Raises:
        UsageError: the ranks do not divide T; later, a layer with dropout is made.
    """
    if comm.size == 1:
        return layers
    must_divide(comm.size, "seq_len", seq_len, "sequence_parallel")

    def attention(heads: int, dropout: float, *args: Any, **options: Any) -> keras.layers.Layer:
        if dropout:
            raise UsageError(f"dropout {dropout:g} with rows that ranks share: set it to 0")
        layer = layers.attention(heads, dropout, *args, **options)
        layer.tf_dist_talks = True
        return layer

    def positions(**options: Any) -> keras.layers.Layer:
        return SharedPositions(seq_len, comm.rank, comm.size, **options)

    ring = RingAttention(comm)
    return layers._replace(attend=ring, attention=attention, positions=positions, sequence=comm.size)


@keras.saving.register_keras_serializable("tf_dist")
class SharedPositions(LearnedPositions):
    """`LearnedPositions` of the tokens that a rank has: (B, L, D) -> (B, L, D).

    The table is whole, (T, D), and its gradient is zero where other ranks' tokens are.

    Args:
        seq_len: T.
        rank: place among the ranks that share rows.
        ranks: s.
    """

    def __init__(self, seq_len: int, rank: int, ranks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seq_len, self.rank, self.ranks = seq_len, rank, ranks

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the table of positions, (T, D)."""
        assert input_shape[1] == len(columns(self.seq_len, self.rank, self.ranks))
        super().build((None, self.seq_len, input_shape[2]))

    def call(self, x_BxLxD: Any) -> Any:
        """Return the input with its positions."""
        return x_BxLxD + _rows(tf.convert_to_tensor(self.table_TxD), self.seq_len, self.rank, self.ranks)

    def get_config(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        return {**super().get_config(), "seq_len": self.seq_len, "rank": self.rank, "ranks": self.ranks}


def _rows(table_TxD: Any, seq_len: int, rank: int, ranks: int) -> Any:
    """A rank's rows of the table, (L, D); the gradient is made in one pass, not one for each chunk."""
    early, late = own_chunks(seq_len, rank, ranks)
    between = [early.start, late.start - early.stop, seq_len - late.stop]

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(table_TxD: Any) -> Any:
        rows = [table_TxD[one.start : one.stop] for one in (early, late)]

        def gradient(drows_LxD: Any) -> Any:
            before, middle, after = (tf.zeros((n, drows_LxD.shape[1]), drows_LxD.dtype) for n in between)
            parts = [before, drows_LxD[: len(early)], middle, drows_LxD[len(early) :], after]
            return tf.concat(parts, axis=0)

        return tf.concat(rows, axis=0), gradient

    return run(table_TxD)
