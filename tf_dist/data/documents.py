"""Rows of packed documents: what is predicted of them.

Legend: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tf_dist.data.mixture import mixture_of
from tf_dist.data.rows import Rows
from tf_dist.data.tokens import NO_TARGET, Batch


class PackedRows:
    """Windows of text in which the token that ends a document has no target.

    The next token is the first one of another document. Nothing in the document foretells it, and the other
    document is there by the order of files alone: its loss would reward looking for relations between the
    two, which the model is not to see.

    Args:
        windows: of text.
        end: id of the token that ends a document.
    """

    def __init__(self, windows: Rows, end: int) -> None:
        self.tokens, self.seq_len = windows.tokens, windows.seq_len
        self.mixture = mixture_of(windows)
        self._windows, self._end = windows, end

    def __len__(self) -> int:
        return len(self._windows)

    def rows(self, indices: npt.ArrayLike, draw: tuple[int, int] | None = None) -> tuple[Batch, Batch]:
        """As in `Rows`."""
        x_BxT, y_BxT = self._windows.rows(indices, draw)
        return x_BxT, np.where(x_BxT == self._end, NO_TARGET, y_BxT).astype(np.int32)

    def must_be_below(self, vocab_size: int) -> None:
        """As in `Rows`."""
        self._windows.must_be_below(vocab_size)
