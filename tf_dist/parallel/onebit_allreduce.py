"""All-reduce of signs, with the mean magnitude of each block: 32 times fewer bytes.

As in 1-bit SGD (Seide et al. 2014) with one scale per block, and exchanged like bfloat16 (`bf16_allreduce`):
every rank adds its slice of all terms, then the sums are reduced to signs once more and all-gathered.
"""

from __future__ import annotations

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.comm.transport.reduction_order import slices_of_blocks
from tf_dist.parallel.bf16_allreduce import all_to_all

# Elements that share a scale; a multiple of the blocks at which slices are split.
BLOCK = 2048


def encoded_bytes(length: int) -> int:
    """Bytes of ``length`` encoded elements."""
    return 4 * -(-length // BLOCK) + -(-length // 8)


def encode(array: np.ndarray, out: np.ndarray) -> None:
    """Encode float32 as signs and mean magnitudes.

    Args:
        array: any length.
        out: uint8, of `encoded_bytes`.
    """
    scales = -(-array.size // BLOCK)
    starts = np.arange(0, array.size, BLOCK)
    counts = np.minimum(BLOCK, array.size - starts)
    if array.size:
        out[: 4 * scales].view(np.float32)[:] = np.add.reduceat(np.abs(array), starts) / counts
        out[4 * scales :] = np.packbits(array >= 0)


def decode(raw: np.ndarray, length: int) -> np.ndarray:
    """Decode the result of `encode` to float32."""
    scales = -(-length // BLOCK)
    values = np.repeat(raw[: 4 * scales].view(np.float32), BLOCK)[:length]
    return np.where(np.unpackbits(raw[4 * scales :], count=length), values, -values)


def allreduce_signs(comm: Comm, array: np.ndarray, left: np.ndarray) -> None:
    """Replace ``array``, float32, by the sum over ranks of its encoded values, encoded once more.

    A rank sends about (R - 1) / R of 2 P / 8 bytes.

    Args:
        comm: the ranks.
        array: this rank's; receives the sum.
        left: receives the encoding error: of this rank's own array, and of the sum of its slice. The sum of
            all ranks' arrays equals the result plus all their ``left``.
    """
    parts = slices_of_blocks(array.size, comm.size)
    lengths = [part.stop - part.start for part in parts]
    own = [np.empty(encoded_bytes(length), np.uint8) for length in lengths]
    for part, raw, length in zip(parts, own, lengths, strict=True):
        encode(array[part], raw)
        left[part] = array[part] - decode(raw, length)
    mine = lengths[comm.rank]
    first, *others = all_to_all(comm, own)
    total = decode(first, mine)
    for other in others:
        total += decode(other, mine)
    ends = np.cumsum([raw.size for raw in own])
    gathered = [slice(int(end) - raw.size, int(end)) for end, raw in zip(ends, own, strict=True)]
    whole = np.empty(int(ends[-1]), np.uint8)
    summed = np.empty(encoded_bytes(mine), np.uint8)  # aligned, for its scales
    encode(total, summed)
    left[parts[comm.rank]] += total - decode(summed, mine)
    whole[gathered[comm.rank]] = summed
    comm.allgather(whole, gathered)
    for part, place, length in zip(parts, gathered, lengths, strict=True):
        array[part] = decode(whole[place].copy(), length)
