"""ZeRO: what data-parallel ranks all have alike is divided among them (Rajbhandari et al. 2020).

The flat array of P parameters is cut into one shard for each of R ranks. In stage 1 each rank keeps the
optimizer's state of its shard alone; in stage 2 also the summed gradient; in stage 3 also the weights. Bytes of
a rank for each float32 parameter, with Adam's two moments and beside activations:

    allreduce   16            weights 4, gradient 4, moments 8
    stage 1     8 + 8 / R     reduce-scatter of the gradient, step of the shard, allgather of the weights
    stage 2     4 + 12 / R    gradients leave for their owners while the backward pass makes them
    stage 3     16 / R        weights come when a layer needs them, and go again

Shards are cut at whole blocks of squares, so that the global norm is made of the very sums that a rank alone
would have made; gradients are added in the order of the tree, and an elementwise optimizer changes each weight
by itself. So no bit depends on how many ranks share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from tf_dist.comm.base import SQUARES_BLOCK, Comm, Order, block_squares, slices_of_blocks
from tf_dist.parallel.flat import aligned_empty, norm, norm_of
from tf_dist.parallel.updates import TOKENS, Totals, scale_of

SHARED = "a shared window"


class Sharded(Protocol):
    """A copy of the model that steps a shard of its flat array of P parameters."""

    parameters: int

    def apply(self, gradient: np.ndarray, scale: float) -> None:
        """Take one optimizer step of this rank's shard."""

    def read_shard(self, out: np.ndarray) -> None:
        """Copy this rank's shard of the weights to ``out``."""

    def write_others(self, weights: np.ndarray) -> None:
        """Take over the shards of the other ranks from all weights, (P,)."""


def zero(
    terms: list[np.ndarray], order: Order, totals: Totals, clip_norm: float, replica: Sharded, comm: Comm
) -> float:
    """Stage 1: each rank sums and steps its shard; all gather the new weights.

    Arguments, result and errors are those of `tf_dist.parallel.updates.allreduce`. A rank sends as many bytes.
    """
    comm.barrier()
    counts = totals.reduce(comm)
    shards = slices_of_blocks(replica.parameters, comm.size)
    mine = shards[comm.rank]
    whole = terms[0] if terms else aligned_empty(replica.parameters)
    if comm.carried_by == SHARED:  # nothing is sent, and the sum lies where all can see it
        whole, squares = comm.allreduce_terms(terms, order, whole)
        length = norm(whole, squares) if comm.rank == 0 else 0.0
    else:
        comm.reduce_scatter_terms(terms, order, shards, whole[mine])
        length = norm_of_shards(whole[mine], shards, comm)
    # Also the barrier behind which nobody looks at another rank's part of the sum any more.
    length = agreed(length, comm) / max(counts[TOKENS], 1.0)
    replica.apply(whole[mine], scale_of(length, counts, clip_norm))
    replica.read_shard(whole[mine])
    comm.allgather(whole, shards)
    replica.write_others(whole)
    return length


def agreed(length: float, comm: Comm) -> float:
    """Rank 0's number for all: on a node with another processor it could differ in its last bit."""
    number = np.array([length])
    comm.broadcast(number)
    return float(number[0])


def norm_of_shards(shard: np.ndarray, shards: Sequence[slice], comm: Comm) -> float:
    """`tf_dist.parallel.flat.norm` of an array of which each rank has a shard; a collective.

    Args:
        shard: this rank's.
        shards: of all ranks, by `slices_of_blocks`.
        comm: these ranks.

    Returns:
        The same bits as for the whole array, unless its squares leave the range of float32.
    """
    blocks = [slice(part.start // SQUARES_BLOCK, part.stop // SQUARES_BLOCK) for part in shards]
    mine = blocks[comm.rank]
    squares = np.empty(blocks[-1].stop, np.float32)
    block_squares(shard, squares[mine])
    comm.allgather(squares, blocks)
    rest = shard[(mine.stop - mine.start) * SQUARES_BLOCK :]  # the last rank's alone

    def exactly() -> float:
        return _summed(float(np.einsum("i,i->", shard, shard, dtype=np.float64)), comm)

    with np.errstate(over="ignore", invalid="ignore"):
        return norm_of(squares, _summed(float(np.einsum("i,i->", rest, rest)), comm), exactly)


def _summed(number: float, comm: Comm) -> float:
    """The sum of a number of each rank, in rank order."""
    numbers = np.zeros(comm.size)
    numbers[comm.rank] = number
    comm.allreduce(numbers)
    return float(numbers.sum())
