r"""Sums in the order of a binary tree over micro-batches, whoever computed them.

Floating-point addition is not associative: ((a + b) + c) + d and (a + b) + (c + d) differ in the last
bits. Summing neighbours, then neighbours of neighbours, gives an order in which the share of a rank
is a whole subtree when ranks divide the micro-batches into equal powers of two.

         s07
      /       \
    s03       s47        rank 0 of 2 has s03, rank 1 has s47; their sum is s07,
   /   \     /   \       the very additions that one rank would have made.
  s01  s23 s45  s67
"""

from __future__ import annotations

import numpy as np

from tf_dist.parallel.flat import aligned_empty


class TreeSum:
    """Adds arrays one after another in tree order, keeping at most log2(n) + 1 of them.

    It counts in binary: slot k holds the sum of 2^k neighbours or nothing, and adding an array
    carries. Buffers are kept from one sum to the next.

    Args:
        length: elements of each float32 array.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._slots: list[np.ndarray | None] = []
        self._free: list[np.ndarray] = []

    def add(self, array: np.ndarray) -> None:
        """Add an array of shape (length,); it is read, not kept."""
        carry, ours = array, False
        for level, left in enumerate(self._slots):
            if left is None:
                break
            left += carry
            if ours:
                self._free.append(carry)
            carry, ours = left, True
            self._slots[level] = None
        else:
            level = len(self._slots)
            self._slots.append(None)
        if not ours:
            kept = self._take()
            np.copyto(kept, carry)
            carry = kept
        self._slots[level] = carry

    def result(self) -> np.ndarray:
        """The sum of what was added, zeros if nothing was; valid until the next `add` or `result`.

        Begins anew: the next `add` is the first term of another sum.
        """
        terms = [slot for slot in self._slots if slot is not None]
        if not terms:
            zeros = self._take()
            zeros.fill(0.0)
            terms = [zeros]
        total = terms[0]  # the smallest and latest subtree; each next one stands to its left
        for left in terms[1:]:
            left += total
            self._free.append(total)
            total = left
        self._slots = []
        self._free.append(total)
        return total

    def _take(self) -> np.ndarray:
        return self._free.pop(0) if self._free else aligned_empty(self.length)
