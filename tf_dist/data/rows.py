"""Rows that a `Trainer` trains on: what it asks of a data set, and rows of fixed shape in one array.

Legend: N rows, B rows of a batch, W words of an input, U targets of a row.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tf_dist.data.tokens import NO_SEQUENCE, NO_TARGET, Batch, foreign_token
from tf_dist.errors import DataError


class Rows(Protocol):
    """A data set of rows that have all one shape.

    Attributes:
        tokens: the array that holds them, by which ranks compare their data.
        seq_len: W.
    """

    tokens: npt.NDArray[Any]
    seq_len: int

    def __len__(self) -> int:
        """N."""

    def rows(self, indices: npt.ArrayLike, draw: tuple[int, int] | None = None) -> tuple[Batch, Batch]:
        """The rows of a batch.

        Args:
            indices: shape (B,); -1 for a row of padding.
            draw: (step, micro-batch) of training, which determines random changes; None: of validation.

        Returns:
            Inputs (B, W) and targets (B, U), int32. A target of -1 is ignored.
        """

    def must_be_below(self, vocab_size: int) -> None:
        """Raise `DataError` for an id outside of the model's vocabulary, or its classes."""


class Examples:
    """Rows whose inputs and targets stand side by side in one array.

    Args:
        words: (N (W + U),) int32, memory-mapped or not.
        seq_len: W.
        targets: U.

    Raises:
        DataError: not int32, no whole number of rows, or rows without words or targets.
    """

    def __init__(self, words: npt.NDArray[Any], seq_len: int, targets: int) -> None:
        self.tokens, self.seq_len, self.targets = words, seq_len, targets
        width = seq_len + targets
        if min(seq_len, targets) < 1:
            raise DataError(f"rows of {seq_len} words and {targets} targets: both must be at least 1")
        if words.dtype.kind != "i" or words.dtype.itemsize != 4 or words.ndim != 1 or words.size % width:
            raise DataError(
                f"examples are {words.dtype} of shape {words.shape}: want int32 in rows of {width}"
            )
        self._words_NxW = words.reshape(-1, width)

    def __len__(self) -> int:
        return len(self._words_NxW)

    def rows(self, indices: npt.ArrayLike, draw: tuple[int, int] | None = None) -> tuple[Batch, Batch]:
        """As in `Rows`; nothing is random.

        Raises:
            IndexError: no such row.
        """
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if index.size and not (NO_SEQUENCE <= index.min() and index.max() < len(self)):
            raise IndexError(f"rows {index.min()} to {index.max()} asked for, there are {len(self)}")
        if not len(self):
            empty = np.zeros((len(index), self.seq_len), np.int32)
            return empty, np.full((len(index), self.targets), NO_TARGET, np.int32)
        found = self._words_NxW[np.maximum(index, 0)].astype(np.int32)
        x, y = found[:, : self.seq_len].copy(), found[:, self.seq_len :].copy()
        x[index < 0], y[index < 0] = 0, NO_TARGET
        return x, y

    def must_be_below(self, vocab_size: int) -> None:
        """Refuse a target outside of a model's classes.

        Raises:
            DataError: with the target.
        """
        targets = np.ascontiguousarray(self._words_NxW[:, self.seq_len :])
        found = foreign_token(np.where(targets == NO_TARGET, 0, targets), vocab_size)
        if found:
            raise DataError(
                f"target {found[0]} of row {found[1] // self.targets} is none of the model's {vocab_size} "
                "classes: the data were prepared for another model. Prepare them again"
            )
