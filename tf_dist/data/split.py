"""Train/validation split: by a hash of each document, so it does not depend on ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tf_dist.data.sampler import MASK, mix, mix_words
from tf_dist.errors import UsageError


def check_fraction(val_fraction: float) -> None:
    """Raise `UsageError` unless 0 <= ``val_fraction`` < 1."""
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction is {val_fraction}: it must be at least 0 and less than 1.")


def choose_validation(sizes: npt.NDArray[np.int64], val_fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Choose documents with about ``val_fraction`` of all bytes, at least one and never all.

    Documents are taken in the order of a hash of (seed, number) as long as they fit; if none fits, the
    smallest is taken. A single document is not taken.

    Args:
        sizes: bytes of each document, shape (documents,).
        val_fraction: of the bytes; 0 takes none.
        seed: of the hash.

    Returns:
        True for validation documents, shape (documents,).
    """
    chosen = np.zeros(len(sizes), dtype=np.bool_)
    if not val_fraction or len(sizes) < 2:
        return chosen
    numbers = np.arange(len(sizes), dtype=np.uint64)
    order = np.argsort(mix_words(numbers ^ np.uint64(mix(seed & MASK))), kind="stable")
    left, smallest = int(sizes.sum() * val_fraction), int(sizes.min())
    for number in order:
        if left < smallest:
            break
        if sizes[number] <= left:
            chosen[number] = True
            left -= int(sizes[number])
    if not chosen.any():
        chosen[order[np.argmin(sizes[order])]] = True
    return chosen


def train_characters(characters: int, val_fraction: float) -> int:
    """Number of characters of a single document for training; the rest is for validation."""
    return int(characters * (1 - val_fraction))
