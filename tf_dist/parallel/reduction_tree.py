r"""Sums in the order of one binary tree over micro-batches, whichever ranks computed them.

Floating-point addition is not associative: ((a + b) + c) + d and (a + b) + (c + d) differ in the last
bits. So the order is fixed, by a tree over the micro-batches of a global batch that does not depend on
ranks: its left side holds the largest power of two of them that leaves something for the right.

         s07
      /       \
    s03       s47        2 ranks: rank 0 has s03, rank 1 has s47
   /   \     /   \       3 ranks: rank 0 has s01 and s2, rank 1 has s3 and s45, rank 2 has s67
  s01  s23 s45  s67

A rank has a block of consecutive micro-batches. It adds the largest subtrees inside its block locally
(`BlockSum`); the remaining additions are made across ranks (`order`). They are the same additions that
one rank would make, so the result has the same bits. ``docs/exactness.md`` has the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from tf_dist.comm.transport.reduction_order import ReductionOrder
from tf_dist.parallel.flat_buffer import aligned_empty


def subtrees(leaves: range, block: range) -> list[range]:
    """The largest subtrees of the tree over ``leaves`` whose leaves all lie in ``block``, left to right.

    At most 2 log2(n) for n leaves, and one if equal powers of two divide the leaves.
    """
    first, last = max(leaves.start, block.start), min(leaves.stop, block.stop)
    if first >= last:
        return []
    if (first, last) == (leaves.start, leaves.stop):
        return [leaves]
    left, right = _halves(leaves)
    return subtrees(left, block) + subtrees(right, block)


def order(leaves: range, blocks: Sequence[range]) -> ReductionOrder:
    """The additions across ranks that complete the tree over ``leaves``.

    Args:
        leaves: of the tree.
        blocks: the leaves of each rank, (R,), which together are all, in order; a block may be empty.
    """
    shares = [subtrees(leaves, block) for block in blocks]
    terms = [term for share in shares for term in share]
    additions: list[tuple[int, int]] = []
    _complete(leaves, {term: number for number, term in enumerate(terms)}, additions)
    return ReductionOrder(tuple(len(share) for share in shares), tuple(additions))


@lru_cache(maxsize=8)
def one_each(ranks: int) -> ReductionOrder:
    """The order of a sum of one term per rank."""
    return order(range(ranks), [range(rank, rank + 1) for rank in range(ranks)])


def _complete(node: range, terms: dict[range, int], additions: list[tuple[int, int]]) -> int:
    """Append the additions that make ``node`` from ``terms``; returns the index of its term."""
    if node in terms:
        return terms[node]
    left, right = (_complete(half, terms, additions) for half in _halves(node))
    additions.append((left, right))
    return left


def _halves(node: range) -> tuple[range, range]:
    middle = node.start + (1 << ((len(node) - 1).bit_length() - 1))
    return range(node.start, middle), range(middle, node.stop)


class BlockSum:
    """Adds the arrays of one rank's block of leaves into the terms of a `ReductionOrder`.

    Args:
        length: elements of each float32 array.
        leaves: of the full tree.
        block: those of this rank; may be empty.
        buffers: returns the buffers of the next sum's terms (`Comm.term_buffers`); None: anywhere.
    """

    def __init__(
        self,
        length: int,
        leaves: range,
        block: range,
        buffers: Callable[[], list[np.ndarray]] | None = None,
    ) -> None:
        self._buffers = buffers
        self._sizes = [len(term) for term in subtrees(leaves, block)]
        self._sums = [TreeSum(length) for _ in self._sizes]
        self._begin()

    def _begin(self) -> None:
        self._term, self._added = 0, 0
        self._last: list[np.ndarray] | None = None

    def add(self, array: np.ndarray) -> None:
        """Add the array of the next leaf, of shape (length,); it is read, not kept."""
        self._settle()
        self._sums[self._term].add(array)
        self._added += 1
        if self._added == self._sizes[self._term]:
            self._term, self._added = self._term + 1, 0

    def _settle(self) -> None:
        """Before the first leaf: place the terms of this sum in their buffers."""
        if self._buffers and not self._term and not self._added:
            for tree, home in zip(self._sums, self._buffers(), strict=True):
                tree.home = home

    def open_last(self) -> list[np.ndarray]:
        """Open the last leaf of the block, which `add_part` adds; returns the terms, in their final place.

        A block without leaves has no terms, and nothing to add.
        """
        self._settle()
        if self._sizes:
            assert (self._term, self._added) == (len(self._sizes) - 1, self._sizes[-1] - 1)
            self._last = [tree.result() for tree in self._sums[:-1]] + [self._sums[-1].open_last()]
        else:
            self._last = []
        return self._last

    def add_part(self, start: int, array: np.ndarray) -> None:
        """Add a slice of the last leaf, from ``start`` on; these elements are then final in all terms."""
        self._sums[-1].add_part(start, array)

    def terms(self) -> list[np.ndarray]:
        """The terms of this rank, once all leaves of the block were added; valid until the next `add`."""
        if self._last is not None:  # `add_part` has completed them
            last = self._last
            self._begin()
            return last
        assert self._term == len(self._sizes), "a leaf of the block is missing"
        self._begin()
        return [tree.result() for tree in self._sums]


class TreeSum:
    """Adds arrays one by one in tree order, keeping at most log2(n) + 1 partial sums.

    It counts in binary: slot k holds a sum of 2^k consecutive arrays or nothing, and adding an array
    carries. Buffers are reused by the next sum.

    Args:
        length: elements of each float32 array.

    Attributes:
        home: buffer for the result; None: anywhere. To be set before the first `add` of a sum.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.home: np.ndarray | None = None
        self._slots: list[np.ndarray | None] = []
        self._open: list[np.ndarray] = []
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

        Resets: the next `add` is the first term of another sum.
        """
        terms = [slot for slot in self._slots if slot is not None]
        if not terms:
            zeros = self._take()
            zeros.fill(0.0)
            terms = [zeros]
        total = terms[0]  # the smallest and latest subtree; each next one is to its left
        for left in terms[1:]:
            left += total
            self._free.append(total)
            total = left
        self._slots = []
        if total is not self.home:
            self._free.append(total)
        return total

    def open_last(self) -> np.ndarray:
        """Open the last array, whose elements `add_part` adds; returns the result buffer.

        Like `result`, it is valid until the next `add`, which starts another sum.
        """
        self._open = [slot for slot in self._slots if slot is not None]
        total = self._whole = self._open[-1] if self._open else self._take()
        self._free += [array for array in [*self._open[:-1], total] if array is not self.home]
        self._slots = []
        return total

    def add_part(self, start: int, array: np.ndarray) -> None:
        """Add a slice of the last array to everything added before, as `add` and `result` would."""
        where, carry = slice(start, start + array.size), array
        for left in self._open:  # the smallest and latest subtree first
            left[where] += carry
            carry = left[where]
        if not self._open:
            np.copyto(self._whole[where], array)

    def _take(self) -> np.ndarray:
        # Sums are made in the left operand, so the first array's buffer becomes that of the result.
        if self.home is not None and not any(slot is not None for slot in self._slots):
            return self.home
        return self._free.pop(0) if self._free else aligned_empty(self.length)
