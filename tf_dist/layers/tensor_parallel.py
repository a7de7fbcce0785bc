"""The tensor-parallel layers, as a model's constructor takes them."""

from __future__ import annotations

from functools import partial

from tf_dist.comm.transport.base import Comm
from tf_dist.layers.attention import ParallelCrossAttention, ParallelSelfAttention
from tf_dist.layers.dense import ColumnParallelDense, RowParallelDense
from tf_dist.layers.embedding import VocabularyParallelEmbedding
from tf_dist.layers.lstm import ParallelLSTM
from tf_dist.models.transformer import PLAIN, Layers


def tensor_parallel(comm: Comm, layers: Layers = PLAIN) -> Layers:
    """Layers with which `tf_dist.models.build.build` builds a tensor-parallel model.

    Args:
        comm: the ranks, `Mesh.tensor`.
        layers: other replaced layers.
    """
    if comm.size == 1:
        return layers
    return layers._replace(
        column_dense=partial(ColumnParallelDense, comm=comm),
        row_dense=partial(RowParallelDense, comm=comm),
        attention=partial(ParallelSelfAttention, comm=comm),
        lstm=partial(ParallelLSTM, comm=comm),
        cross_attention=partial(ParallelCrossAttention, comm=comm),
        embedding=partial(VocabularyParallelEmbedding, comm=comm),
    )
