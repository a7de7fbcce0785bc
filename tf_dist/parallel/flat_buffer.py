"""Many arrays packed into one aligned buffer, with views of each.

One collective over one buffer costs one latency; a collective per tensor costs hundreds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np

from tf_dist.comm.transport.reduction_order import SQUARES_BLOCK, block_squares

# Below this, a sum of squares may have lost terms to float32 underflow.
TINY = 1e-25
# A cache line, and the alignment at which TensorFlow uses a buffer without a copy.
ALIGNMENT_BYTES = 64


class FlatLayout:
    """Layout of several arrays in one buffer, contiguous in the given order.

    Attributes:
        shapes: of the arrays.
        sizes: their numbers of elements.
        starts: offset of each, and finally the end of the last.
        total: elements of the buffer.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.sizes = [prod(shape) for shape in self.shapes]
        self.starts: list[int] = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)]).tolist()
        self.total = int(self.starts[-1])

    def views(self, buffer: np.ndarray) -> list[np.ndarray]:
        """Views of the arrays in ``buffer``.

        Raises:
            ValueError: the buffer is not one-dimensional or not ``total`` long.
        """
        if buffer.shape != (self.total,):
            raise ValueError(f"this layout takes a buffer of shape ({self.total},), not {buffer.shape}")
        parts = zip(self.starts[:-1], self.sizes, self.shapes, strict=True)
        return [buffer[start : start + size].reshape(shape) for start, size, shape in parts]


def neighbours(places: Sequence[int]) -> list[range]:
    """Group positions in ``places``, ascending numbers, into runs of consecutive numbers."""
    begins = [i for i in range(len(places)) if not i or places[i] != places[i - 1] + 1]
    return [range(*ends) for ends in pairwise([*begins, len(places)])]


def aligned_empty(length: int, dtype: np.dtype | type = np.float32) -> np.ndarray:
    """An uninitialized 1-D array of ``length`` elements that begins on a 64-byte boundary."""
    itemsize = np.dtype(dtype).itemsize
    raw = np.empty(length * itemsize + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + length * itemsize].view(dtype)


def norm(array: np.ndarray, squares: np.ndarray | None = None) -> float:
    """The Euclidean norm of a float32 array; infinite or NaN if an element is.

    Squares are summed in blocks and the blocks in float64, single-threaded in one order, so the result
    depends on the array only: with BLAS and TensorFlow it depends on the number of threads.

    Args:
        array: of any length.
        squares: the sums of squares of its full blocks, if a `Comm` has computed them already.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if squares is None:
            squares = np.empty(array.size // SQUARES_BLOCK, np.float32)
            block_squares(array, squares)
        rest = array[squares.size * SQUARES_BLOCK :]
        total = float(squares.sum(dtype=np.float64)) + float(np.einsum("i,i->", rest, rest))
        if not TINY < total < np.inf:  # float32 squares overflow or underflow, or an element is not finite
            total = float(np.einsum("i,i->", array, array, dtype=np.float64))
        return float(np.sqrt(total))
