"""`CachedForward`: what computes logits at new positions; and `WindowForward`, which keeps no cache.

Legend: B rows, N new positions of a call, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class CachedForward(Protocol):
    """The forward pass of a model that keeps what it has computed of earlier positions.

    All ranks that share the model call all methods together, with the same arguments, and get the same bits.

    Attributes:
        limit: positions of a row that it can hold; None: any number.
        longest: positions in one call, at most.
        lockstep: whether data-parallel ranks have to call it together as well (ZeRO stage 3).
    """

    limit: int | None
    longest: int
    lockstep: bool

    def begin(self, batch: int, length: int) -> Any:
        """The state of ``batch`` rows before their first position, for up to ``length`` positions."""

    def __call__(
        self, x_BxN: np.ndarray, start_B: np.ndarray, count_B: np.ndarray, state: Any
    ) -> tuple[np.ndarray, Any]:
        """Logits at the last new position of each row, (B, V) float32, and the state with the new positions.

        Args:
            x_BxN: token ids, int32; padded on the right.
            start_B: position of the first one of each row, int32: how many the state has of that row.
            count_B: how many are no padding, int32; of a row without any the logits have no meaning.
            state: from `begin`, or the call before; not to be used again.
        """

    def select(self, state: Any, rows: np.ndarray) -> Any:
        """The state of other rows: of row ``rows[b]`` for each b, which may come several times."""


class WindowForward:
    """Logits of any causal model, each time from all tokens of the window: the slow way, and the reference.

    Args:
        logits_at: token ids (B, T) int32, padded on the right, and a position in each row, (B,) -> (B, V).
        seq_len: T.
        lockstep: as in `CachedForward`.
    """

    def __init__(
        self,
        logits_at: Callable[[np.ndarray, np.ndarray], np.ndarray],
        seq_len: int,
        lockstep: bool = False,
    ) -> None:
        self._logits_at = logits_at
        self.limit: int | None = seq_len
        self.longest, self.lockstep = seq_len, lockstep

    def begin(self, batch: int, length: int) -> np.ndarray:
        """As in `CachedForward`: an empty window."""
        return np.zeros((batch, self.longest), np.int32)

    def __call__(
        self, x_BxN: np.ndarray, start_B: np.ndarray, count_B: np.ndarray, state: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As in `CachedForward`."""
        for row, (x_N, start, count) in enumerate(zip(x_BxN, start_B, count_B, strict=True)):
            state[row, start : start + count] = x_N[:count]
        return np.asarray(self._logits_at(state, start_B + np.maximum(count_B, 1) - 1)), state

    def select(self, state: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """As in `CachedForward`."""
        return np.asarray(state[rows])
