"""Keras layers whose work ranks share (tensor parallelism; Megatron-LM, Shoeybi et al. 2019).

Each takes the Comm of the ranks that share it, ``mesh.tensor``. All of them must call it with the same input.
"""

from tf_dist.layers.attention import ParallelSelfAttention
from tf_dist.layers.dense import ColumnParallelDense, RowParallelDense
from tf_dist.layers.embedding import VocabularyParallelEmbedding
from tf_dist.layers.lstm import ParallelLSTM
from tf_dist.layers.shared import tensor_parallel

__all__ = [
    "ColumnParallelDense",
    "ParallelLSTM",
    "ParallelSelfAttention",
    "RowParallelDense",
    "VocabularyParallelEmbedding",
    "tensor_parallel",
]
