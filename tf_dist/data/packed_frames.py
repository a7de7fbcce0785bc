"""Frames and patches as int32 words, so that rows of sound and pictures move like rows of tokens.

Shapes: F frames of M values; r frames stacked; P positions of M values (M even); W words of a row.

A word holds two float16 values, the first in its lower 16 bits. Padding is NaN, always with all bits set:
two of them are the word -1, the padding of targets, which the loss ignores. No number has these bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tf_dist.errors import DataError, UsageError

PADDING_WORD = -1
PADDING_BITS = 0xFFFF  # a NaN of float16


def stack_frames(values_FxM: NDArray[np.floating[Any]], r: int) -> NDArray[np.float32]:
    """Join each r consecutive frames to one position, so that a model has fewer positions.

    Tacotron's reduction factor (Wang et al. 2017, arXiv:1703.10135).

    Args:
        values_FxM: frames.
        r: how many become one.

    Returns:
        (ceil(F / r), r * M) float32; frames that the last position lacks are NaN.

    Raises:
        UsageError: r is less than 1.
    """
    if r < 1:
        raise UsageError(f"{r} frames cannot be stacked: at least 1")
    frames, values = values_FxM.shape
    positions = -(-frames // r)
    stacked = np.full((positions * r, values), np.nan, np.float32)
    stacked[:frames] = values_FxM
    return stacked.reshape(positions, r * values)


def unstack_frames(stacked_PxM: NDArray[np.floating[Any]], r: int) -> NDArray[np.float32]:
    """Frames of `stack_frames` again, without padding: those after the last frame that has a number.

    Args:
        stacked_PxM: positions of r frames each; padding at the end is NaN.
        r: how many frames are one position.

    Returns:
        (F, M / r) float32.

    Raises:
        UsageError: M is no multiple of r.
    """
    if r < 1 or stacked_PxM.shape[1] % r:
        raise UsageError(f"positions of {stacked_PxM.shape[1]} values are not {r} stacked frames")
    frames = np.asarray(stacked_PxM, np.float32).reshape(-1, stacked_PxM.shape[1] // r)
    present = np.flatnonzero(~np.isnan(frames).all(axis=1))
    return frames[: present[-1] + 1 if len(present) else 0]


def pack_words(values_PxM: NDArray[np.floating[Any]]) -> NDArray[np.int32]:
    """Values, rounded to float16, as words.

    Args:
        values_PxM: numbers, or NaN where there is padding.

    Returns:
        (P * M / 2,) int32; two NaN are -1.

    Raises:
        UsageError: M is odd.
        DataError: a value is infinite, or beyond float16 (65504).
    """
    values = np.asarray(values_PxM)
    if values.ndim != 2 or values.shape[1] % 2:
        raise UsageError(f"values of shape {values.shape} do not fill words: two float16 are one word")
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if np.isinf(halves).any():
        worst = np.nanmax(np.abs(values))
        raise DataError(f"a value of size {worst:g} is beyond float16 (65504). Normalize frames and patches")
    bits = halves.view("<u2")
    bits[np.isnan(halves)] = PADDING_BITS
    return bits.reshape(-1).view("<i4").astype(np.int32)


def unpack_words(words_W: NDArray[np.int32], values: int) -> NDArray[np.float32]:
    """Values of `pack_words` again.

    Args:
        words_W: of `pack_words`, perhaps padded with -1.
        values: M, of a position.

    Returns:
        (W * 2 / M, M) float32; padding is NaN.

    Raises:
        UsageError: the words are no whole number of positions.
    """
    if values < 2 or values % 2 or len(words_W) * 2 % values:
        raise UsageError(
            f"{len(words_W)} words are not positions of {values} values: two values are one word"
        )
    return np.asarray(words_W).astype("<i4").view("<f2").astype(np.float32).reshape(-1, values)


def pad_words(words_W: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    """Words, filled up with -1 to the width of a row.

    Args:
        words_W: at most ``width``; what is longer is cut before, by whole positions, and counted.
        width: of the row.

    Returns:
        (width,) int32.

    Raises:
        DataError: there are more words than the row has.
    """
    if len(words_W) > width:
        raise DataError(f"{len(words_W):,} words of frames or patches in a row of {width:,}. Cut them before")
    return np.pad(np.asarray(words_W, np.int32), (0, width - len(words_W)), constant_values=PADDING_WORD)
