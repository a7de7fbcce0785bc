"""All-reduce in bfloat16: half of the bytes, one rounding of each term and one of the sum.

Every rank adds its slice of all terms, in float32 and in rank order; then the slices are all-gathered. So all
ranks have the same bits, which are those of the rounded sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from tf_dist.comm.transport.base import TAGS, Comm
from tf_dist.comm.transport.reduction_order import slices

# Tag of the all-reduce's messages: the last one, as pipelines use the first ones.
TAG = TAGS - 1


def to_bfloat16(array: np.ndarray, out: np.ndarray) -> None:
    """Round float32 to the nearest bfloat16, ties to even; ``out`` receives the 16 bits as uint16.

    Infinities and NaN stay non-finite.
    """
    np.copyto(out.view(ml_dtypes.bfloat16), array, casting="same_kind")


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Expand bfloat16, the upper halves of float32 values, to float32; exact."""
    return np.asarray(bits.view(ml_dtypes.bfloat16).astype(np.float32))


def all_to_all(comm: Comm, given: Sequence[np.ndarray]) -> list[np.ndarray]:
    """All-to-all: send each rank its array, and return those of all ranks for this one; a collective.

    Args:
        comm: the ranks.
        given: for each rank, (R,): of one dtype, and of a length that all ranks know.

    Returns:
        The received arrays, in rank order.
    """
    came = [np.empty_like(given[comm.rank]) for _ in given]
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    under_way = [comm.irecv(came[rank], rank, TAG) for rank in others]
    under_way += [comm.isend(given[rank], rank, TAG) for rank in others]
    for message in under_way:
        message.wait()
    came[comm.rank] = given[comm.rank]
    return came


def allreduce_bfloat16(comm: Comm, array: np.ndarray, left: np.ndarray | None = None) -> None:
    """Replace ``array``, float32, by the sum over all ranks of its bfloat16 values, rounded once more.

    A rank sends 4 (R - 1) / R bytes for each element.

    Args:
        comm: the ranks.
        array: this rank's; receives the sum.
        left: receives the rounding error: of this rank's own array, and of the sum of its slice. The sum of
            all ranks' arrays equals the result plus all their ``left``.
    """
    parts, own = slices(array.size, comm.size), np.empty(array.size, np.uint16)
    to_bfloat16(array, own)
    if left is not None:
        np.subtract(array, from_bfloat16(own), out=left)
    mine = parts[comm.rank]
    first, *others = all_to_all(comm, [own[part] for part in parts])
    total = from_bfloat16(first)
    for other in others:
        total += from_bfloat16(other)
    whole = np.empty(array.size, np.uint16)
    to_bfloat16(total, whole[mine])
    if left is not None:
        left[mine] += total - from_bfloat16(whole[mine])
    comm.allgather(whole, parts)
    np.copyto(array, from_bfloat16(whole))
