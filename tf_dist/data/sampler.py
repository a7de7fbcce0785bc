"""Dataset order: which sequences make up step s, as a function of the seed and s only.

There is no random state to save, and any rank can compute any step in any order. The
shuffled order of an epoch is a permutation computed per position: a Feistel network over a power-of-two
domain, with cycle walking until the result lies inside the data (Black & Rogaway, *Ciphers with Arbitrary
Finite Domains*, CT-RSA 2002), with the mixing function of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)
as round function. Legend: n sequences, G rows of a global batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tf_dist.errors import UsageError
from tf_dist.partition import share as share

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

PADDING = -1
# Four rounds suffice for large domains; small ones, with halves of a bit or two, need more.
ROUNDS = 8
MASK = (1 << 64) - 1
# Positions of the order computed together: NumPy takes about as long for one as for some hundreds.
BLOCK_PLACES = 4096
GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def mix(value: int) -> int:
    """SplitMix64's finalizer on one 64-bit number: every output bit depends on every input bit."""
    value = (value + GOLDEN) & MASK
    value = ((value ^ (value >> 30)) * MIX_1) & MASK
    value = ((value ^ (value >> 27)) * MIX_2) & MASK
    return value ^ (value >> 31)


def mix_words(words: Words) -> Words:
    """`mix` on each element, shape kept. Arithmetic on unsigned arrays wraps around, as required."""
    words = words + np.uint64(GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(MIX_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(MIX_2)
    return words ^ (words >> np.uint64(31))


class Permutation:
    """A shuffled ``range(n)`` with random access, in memory proportional to the number of positions.

    Args:
        n: how many, 1 or more.
        seed, epoch: together they choose the order.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self.n = n
        self._half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        key = mix(mix(seed & MASK) ^ (epoch & MASK))
        self._keys = [mix(key ^ round_) for round_ in range(ROUNDS)]

    def __call__(self, places: Indices) -> Indices:
        """The elements at ``places``, shape kept; each place in ``range(n)``."""
        values = self._feistel(places.astype(np.uint64))
        # The network permutes 4 ** half_bits numbers, fewer than 4 n or 4. Results beyond n are permuted
        # once more; this walks along a cycle that leads back inside, so it ends.
        while (outside := values >= self.n).any():
            values[outside] = self._feistel(values[outside])
        return values.astype(np.int64)

    def _feistel(self, values: Words) -> Words:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in self._keys:
            left, right = right, left ^ (mix_words(right ^ np.uint64(key)) & mask)
        return (left << bits) | right


class Sampler:
    """The order of training: every sequence once per epoch, in global batches.

    Args:
        n_sequences: n. With 0 there is no step at all.
        global_batch_size: G, rows of one step over all ranks.
        seed: chooses the order of every epoch.
        shuffle: False keeps the order of the data.

    Raises:
        UsageError: a negative ``n_sequences``, or ``global_batch_size`` less than 1.
    """

    def __init__(self, n_sequences: int, global_batch_size: int, seed: int, shuffle: bool = True) -> None:
        if n_sequences < 0:
            raise UsageError(f"n_sequences is {n_sequences}: it cannot be negative.")
        if global_batch_size < 1:
            raise UsageError(f"global_batch_size is {global_batch_size}: it must be 1 or more.")
        self.n_sequences = n_sequences
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._block_steps = max(1, BLOCK_PLACES // global_batch_size)
        self._last: tuple[tuple[int, int], Indices] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches per epoch; the last may be short."""
        return -(-self.n_sequences // self.global_batch_size)

    def epoch(self, step: int) -> int:
        """The epoch of a step, both from 0. Raises `IndexError` if there is no such step."""
        if step < 0 or not self.n_sequences:
            raise IndexError(f"no step {step} over {self.n_sequences} sequences")
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Indices:
        """The sequences of a step, counted from 0 over all epochs.

        Returns:
            int64 of shape (G,); -1 where the last batch of an epoch has no sequence left.

        Raises:
            IndexError: no such step.
        """
        epoch, place = self.epoch(step), step % self.steps_per_epoch
        block, row = divmod(place, self._block_steps)
        last = self._last  # read once: another thread may call this as well
        if last is None or last[0] != (epoch, block):
            last = self._last = (epoch, block), self._batches(epoch, block * self._block_steps)
        batch: Indices = last[1][row].copy()
        return batch

    def _batches(self, epoch: int, first_step: int) -> Indices:
        """Steps of an epoch from ``first_step`` on, (steps, G); padding beyond its end."""
        first = first_step * self.global_batch_size
        places = np.arange(first, first + self._block_steps * self.global_batch_size, dtype=np.int64)
        inside = places < self.n_sequences
        indices = np.full(places.size, PADDING, dtype=np.int64)
        if self.shuffle:
            indices[inside] = Permutation(self.n_sequences, self.seed, epoch)(places[inside])
        else:
            indices[inside] = places[inside]
        return indices.reshape(-1, self.global_batch_size)
