"""Tensor-parallel Keras layers (Megatron-LM, Shoeybi et al. 2019), and context-parallel ones.

Each takes the Comm of its ranks, ``mesh.tensor`` or ``mesh.sequence``. All of them must call it together;
tensor-parallel ones with the same input.
"""

from tf_dist.layers.attention import ParallelSelfAttention
from tf_dist.layers.dense import ColumnParallelDense, RowParallelDense
from tf_dist.layers.embedding import VocabularyParallelEmbedding
from tf_dist.layers.lstm import ParallelLSTM
from tf_dist.layers.tensor_parallel import tensor_parallel

__all__ = [
    "ColumnParallelDense",
    "ParallelLSTM",
    "ParallelSelfAttention",
    "RowParallelDense",
    "VocabularyParallelEmbedding",
    "tensor_parallel",
]
