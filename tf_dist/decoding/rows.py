"""Rows that grow token by token: their tokens, and the state of the model that has read them.

A window that is full slides: the model reads its last T tokens anew, from position 0, for each further token,
as a forward pass without a cache does. So a Transformer with learned positions writes the same text with and
without a cache, and from there on takes as long for each token. A model without a limit (LSTM) reads all of a
prompt, keeps its state and goes on: up to T tokens the text is that without a cache, which from there on
would begin with a zero state T tokens ago.

Legend: B rows, N new positions of a call, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_dist.decoding.forward import CachedForward
from tf_dist.errors import UsageError

# Lengths of caches are multiples of it, so that prompts of similar length share a compiled function.
LENGTH_STEP = 64


class DecodedRows:
    """Rows of tokens with the logits of what follows each.

    Args:
        forward: the model.
        prompts: token ids of each row, at least one.
        room: tokens that will be appended to each row, at most.

    Attributes:
        tokens: of each row, with the prompt.
        logits_BxV: of the next token of each row, float64.
        computed: positions that the model has computed so far, padding and all rows included.

    Raises:
        UsageError: a prompt is empty.
    """

    def __init__(
        self, forward: CachedForward, prompts: Sequence[Sequence[int] | np.ndarray], room: int
    ) -> None:
        if any(len(prompt) == 0 for prompt in prompts):
            raise UsageError("the prompt is empty: give at least one character")
        self._forward, self._room = forward, room
        self.tokens = [[int(i) for i in prompt] for prompt in prompts]
        self.computed = 0
        self.logits_BxV, self._read_B = np.empty((len(prompts), 0)), np.zeros(len(prompts), np.int32)
        self._length: int | None = None
        self._state: Any = None
        self._read()

    def append(self, new_B: np.ndarray, going_B: np.ndarray) -> None:
        """Append a token to each row that is going on, and compute the logits of the next one.

        Args:
            new_B: token ids; others than those of rows that are going on are not used.
            going_B: which rows are going on, bool.
        """
        for row in np.flatnonzero(going_B):
            self.tokens[row].append(int(new_B[row]))
        if self._length is not None and max(self._read_B[going_B], default=0) >= self._length:
            self._read()
            return
        # Rows that have ended are computed as well, at a position that they have: shapes stay the same.
        start_B = self._read_B - ~going_B
        x_Bx1 = (new_B * going_B).astype(np.int32)[:, None]
        self.logits_BxV = self._compute(x_Bx1, start_B, np.ones(len(start_B), np.int32))
        self._read_B = self._read_B + going_B

    def select(self, rows: np.ndarray) -> None:
        """Continue with other rows: with row ``rows[b]`` for each b."""
        self.tokens = [list(self.tokens[row]) for row in rows]
        self.logits_BxV, self._read_B = self.logits_BxV[rows], self._read_B[rows]
        self._state = self._forward.select(self._state, rows)

    def _read(self) -> None:
        """Read the last tokens of all rows into an empty state."""
        limit = self._forward.limit
        windows = [tokens if limit is None else tokens[-limit:] for tokens in self.tokens]
        longest = max(map(len, windows))
        # How many positions the state has room for; None: it needs none.
        self._length = None if limit is None else min(limit, _multiple(longest + self._room, LENGTH_STEP))
        self._state = self._forward.begin(len(windows), self._length or 0)
        self._read_B = np.array([len(window) for window in windows], np.int32)
        for first in range(0, longest, self._forward.longest):
            rest = min(longest - first, self._forward.longest)
            x_BxN = np.zeros((len(windows), _padded(rest, self._length or self._forward.longest)), np.int32)
            parts = [window[first : first + rest] for window in windows]
            for row, part in zip(x_BxN, parts, strict=True):
                row[: len(part)] = part
            count_B = np.array([len(part) for part in parts], np.int32)
            logits_BxV = self._compute(x_BxN, np.minimum(first, self._read_B), count_B)
            kept = logits_BxV if first == 0 else self.logits_BxV
            self.logits_BxV = np.where(count_B[:, None] > 0, logits_BxV, kept)

    def _compute(self, x_BxN: np.ndarray, start_B: np.ndarray, count_B: np.ndarray) -> np.ndarray:
        self.computed += x_BxN.size
        logits_BxV, self._state = self._forward(x_BxN, start_B, count_B, self._state)
        return np.asarray(logits_BxV, np.float64)


def _multiple(number: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-number // step) * step


def _padded(number: int, most: int) -> int:
    """The next power of 2, or ``most``: few compiled functions for prompts of any length."""
    return min(most, 1 << (number - 1).bit_length())
