"""Context parallelism: the layers of a Transformer of which each rank has a part of the tokens of every row.

Legend: B rows, T tokens, D width, s ranks, L = T / s.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.layers.ring_attention import RingAttention
from tf_dist.models.transformer import PLAIN, Layers, LearnedPositions
from tf_dist.parallel.context_partition import columns, own_chunks
from tf_dist.partition import must_divide


def sequence_parallel(comm: Comm, seq_len: int, layers: Layers = PLAIN) -> Layers:
    """Layers with which `tf_dist.models.transformer.build` builds a context-parallel model.

    All layers but attention and positions are local to a token, so only these two are replaced; rope gets
    the tokens' positions. The model takes a rank's `columns` of a row; all weights are replicated.

    Args:
        comm: the ranks that partition rows, `Mesh.sequence`.
        seq_len: T.
        layers: other replaced layers (tensor parallelism).

    Raises:
        UsageError: on every rank: they do not divide T; later, if a layer with dropout is created.
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
    places = columns(seq_len, comm.rank, comm.size)
    return layers._replace(
        attend=ring, attention=attention, positions=positions, places=places, sequence=comm.size
    )


@keras.saving.register_keras_serializable("tf_dist")
class SharedPositions(LearnedPositions):
    """`LearnedPositions` of the tokens of a rank: (B, L, D) -> (B, L, D).

    The table is replicated, (T, D), and its gradient is zero for other ranks' tokens.

    Args:
        seq_len: T.
        rank: index among the ranks that partition rows.
        ranks: s.
    """

    step = None  # type: ignore[assignment]  # a rank knows some of the positions

    def __init__(self, seq_len: int, rank: int, ranks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seq_len, self.rank, self.ranks = seq_len, rank, ranks

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the table of positions, (T, D)."""
        assert input_shape[1] == len(columns(self.seq_len, self.rank, self.ranks))
        super().build((None, self.seq_len, input_shape[2]))

    def call(self, x_BxLxD: tf.Tensor, places_BxL: Any = None) -> Any:
        """Add positions to the input; of packed documents, which are refused before, there are none."""
        assert places_BxL is None
        return x_BxLxD + _rows(tf.convert_to_tensor(self.table_TxD), self.seq_len, self.rank, self.ranks)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "seq_len": self.seq_len, "rank": self.rank, "ranks": self.ranks}


def _rows(table_TxD: tf.Tensor, seq_len: int, rank: int, ranks: int) -> Any:
    """A rank's rows of the table, (L, D); its gradient takes one pass instead of one per chunk."""
    early, late = own_chunks(seq_len, rank, ranks)
    between = [early.start, late.start - early.stop, seq_len - late.stop]

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(table_TxD: tf.Tensor) -> Any:
        rows = [table_TxD[one.start : one.stop] for one in (early, late)]

        def gradient(drows_LxD: tf.Tensor) -> Any:
            before, middle, after = (tf.zeros((n, drows_LxD.shape[1]), drows_LxD.dtype) for n in between)
            parts = [before, drows_LxD[: len(early)], middle, drows_LxD[len(early) :], after]
            return tf.concat(parts, axis=0)

        return tf.concat(rows, axis=0), gradient

    return run(table_TxD)
