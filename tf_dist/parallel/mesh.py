"""`Mesh`: device mesh of data x pipeline x sequence x tensor ranks, with a communicator per axis.

Ranks along *data* have the same part of the model and different micro-batches. Along *pipeline* they have
different layers, along *sequence* the same layers and other tokens of the same rows, along *tensor* shards of
every layer. Tensor is innermost, as it communicates most: adjacent ranks lie on one node.

    8 ranks as 2 x 2 x 1 x 2        data 0                       data 1
                             pipeline 0   pipeline 1      pipeline 0   pipeline 1
                   tensor       0   1        2   3           4   5        6   7
"""

from __future__ import annotations

from math import prod
from typing import Any

from tf_dist.comm.runtime.communicators import as_comm
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.partition import share

AXES = ("data", "pipeline", "sequence", "tensor")
DATA, PIPELINE, SEQUENCE, TENSOR = range(4)


class Mesh:
    """A device mesh; a collective.

    Args:
        comm: all ranks; or a communicator of mpi4py.
        pipeline: degree of pipeline parallelism: ranks that partition the layers.
        sequence: degree of context parallelism: ranks that partition the tokens of a row.
        tensor: degree of tensor parallelism: ranks that partition each layer.

    Attributes:
        shape: ranks along data, pipeline, sequence and tensor.
        at: this rank's coordinates.
        all: all ranks.
        data, pipeline, sequence, tensor: the ranks that differ from this one along this axis only.
        replicas: those that differ along data and sequence: they hold the same weights, and sum gradients.
        model: those that differ along pipeline and tensor: together they hold the weights once.

    Raises:
        UsageError: on every rank: the product does not divide the number of ranks.
    """

    def __init__(self, comm: Comm | Any, pipeline: int = 1, sequence: int = 1, tensor: int = 1) -> None:
        self.all = comm = as_comm(comm)
        self.shape = (data_ranks(comm.size, pipeline, sequence, tensor), pipeline, sequence, tensor)
        axes = [(DATA,), (PIPELINE,), (SEQUENCE,), (TENSOR,), (DATA, SEQUENCE), (PIPELINE, TENSOR)]
        made = comm.grid(self.shape, axes)
        self.data, self.pipeline, self.sequence, self.tensor, self.replicas, self.model = made
        self.at = place(comm.rank, self.shape)

    def renew(self) -> None:
        """Rebuild after ranks failed, all of which were along data (`Comm.regroup`)."""
        assert self.plain
        self.shape, self.at = (self.all.size, 1, 1, 1), (self.all.rank, 0, 0, 0)

    @property
    def plain(self) -> bool:
        """Whether every rank has the full model and full rows."""
        return prod(self.shape[1:]) == 1

    @property
    def reports_loss(self) -> bool:
        """True on the one rank per model replica that contributes the loss."""
        return self.at[PIPELINE] == self.shape[PIPELINE] - 1 and self.at[TENSOR] == 0

    def rank_at(self, **where: int) -> int:
        """The rank that differs from this one in the coordinates given here.

        For instance ``mesh.rank_at(pipeline=0)``.
        """
        at = [where.get(name, here) for name, here in zip(AXES, self.at, strict=True)]
        rank = 0
        for here, size in zip(at, self.shape, strict=True):
            rank = rank * size + here
        return rank

    def __str__(self) -> str:
        used = [f"{name} {n}" for name, n in zip(AXES, self.shape, strict=True) if n > 1 or name == "data"]
        return " x ".join(used)


def place(rank: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A rank's coordinates in a grid, the last axis innermost."""
    at = []
    for size in reversed(shape):
        rank, here = divmod(rank, size)
        at.append(here)
    return tuple(reversed(at))


def leaves_of(micro_batches: int, mesh: Mesh) -> tuple[range, list[range]]:
    """The leaves of a step's `reduction_tree`, and those of each replica.

    A leaf is what one rank computes of a micro-batch: all of it, or its tokens with context parallelism.
    """
    blocks, start = [], 0
    for data in range(mesh.shape[DATA]):
        mine = len(share(micro_batches, data, mesh.shape[DATA]))
        for _ in range(mesh.shape[SEQUENCE]):
            blocks.append(range(start, start + mine))
            start += mine
    return range(start), blocks


def data_ranks(ranks: int, pipeline: int, sequence: int, tensor: int) -> int:
    """Size of the data axis.

    Raises:
        UsageError: the product of the others does not divide the number of ranks.
    """
    each = pipeline * sequence * tensor
    if ranks % each == 0:
        return ranks // each
    product = f"pipeline {pipeline} x sequence {sequence} x tensor {tensor} = {each}"
    if pipeline == sequence == 1:
        product = f"tensor_parallel {tensor}"
    elif sequence == tensor == 1:
        product = f"pipeline_parallel {pipeline}"
    elif pipeline == tensor == 1:
        product = f"sequence_parallel {sequence}"
    fits = [str(n) for n in range(1, ranks + 1) if ranks % n == 0]
    start = [str(n) for n in (ranks // each * each, (ranks // each + 1) * each) if n]
    raise UsageError(
        f"{product} does not divide {ranks} ranks: start {' or '.join(start)} ranks, or let the product of "
        f"--pipeline-parallel, --sequence-parallel and --tensor-parallel be one of {', '.join(fits)}"
    )
