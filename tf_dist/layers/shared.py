"""The layers that share their work, as a model's constructor takes them."""

from __future__ import annotations

from functools import partial

from tf_dist.comm.base import Comm
from tf_dist.layers.attention import ParallelSelfAttention
from tf_dist.layers.dense import ColumnParallelDense, RowParallelDense
from tf_dist.layers.embedding import VocabularyParallelEmbedding
from tf_dist.layers.lstm import ParallelLSTM
from tf_dist.models.transformer import PLAIN, Layers


def tensor_parallel(comm: Comm, layers: Layers = PLAIN) -> Layers:
    """What `tf_dist.models.build.build` makes a model of whose layers the ranks of a Comm share.

    Args:
        comm: the ranks, `Mesh.tensor`.
        layers: what else is divided.
    """
    if comm.size == 1:
        return layers
    return layers._replace(
        column_dense=partial(ColumnParallelDense, comm=comm),
        row_dense=partial(RowParallelDense, comm=comm),
        attention=partial(ParallelSelfAttention, comm=comm),
        lstm=partial(ParallelLSTM, comm=comm),
        embedding=partial(VocabularyParallelEmbedding, comm=comm),
    )
