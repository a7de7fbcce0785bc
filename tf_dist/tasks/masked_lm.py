"""Masked language modelling: hidden tokens are predicted from all others (BERT, Devlin et al. 2019).

Legend: B rows, T tokens of a window, V ids of the tokenizer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tf_dist.config.data import PACKED
from tf_dist.data.mixture import mixture_of
from tf_dist.data.rows import Rows
from tf_dist.data.sampler import MASK as WORD_MASK
from tf_dist.data.sampler import Words, mix, mix_words
from tf_dist.data.tokens import NO_TARGET, Batch
from tf_dist.models.row_layout import TOKENS, Head, RowLayout, Slots
from tf_dist.tasks.base import Task

# Of the tokens, and of those chosen: BERT's shares. The rest of these is left as it is.
CHOSEN, HIDDEN, RANDOM = 0.15, 0.8, 0.1
# Distinguishes the noise of validation from that of a step.
VALIDATION = 1 << 40


class MaskedLM(Task):
    """Windows of running text -> 15 % of their tokens, of which 80 % are hidden, and 10 % replaced."""

    name = "masked-lm"
    roles = ()
    architectures = ("encoder",)
    of_tables = False

    @property
    def source(self) -> Slots:
        """Windows of text are as long as a language model's; ``source_len`` is for tables."""
        return Slots(self.config.seq_len)

    def head(self, classes: int) -> Head:
        """Logits of tokens, (B, T, V)."""
        return Head(TOKENS)

    def rows(self, rows: Rows, layout: RowLayout, seed: int) -> Rows:
        """Windows with noise; of packed documents, the tokens that end one have none."""
        end = self.config.end_of_text if self.config.documents == PACKED else None
        return MaskedRows(rows, layout, seed, end)


class MaskedRows:
    """Windows of text with noise: a function of (seed, step, micro-batch), in validation of (seed, window).

    Args:
        windows: of text; targets of -1 mark what is padding.
        layout: of the rows.
        seed: of the run.
        end: id of a token that is never changed, and comes in no other's place; None: there is none.
    """

    def __init__(self, windows: Rows, layout: RowLayout, seed: int, end: int | None = None) -> None:
        self.tokens, self.seq_len = windows.tokens, windows.seq_len
        self.mixture = mixture_of(windows)
        self._windows, self._layout, self._seed, self._end = windows, layout, seed, end

    def __len__(self) -> int:
        return len(self._windows)

    def rows(self, indices: npt.ArrayLike, draw: tuple[int, int] | None = None) -> tuple[Batch, Batch]:
        """As in `Rows`: the text with noise, and the true tokens at the chosen places."""
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        x_BxT, next_BxT = self._windows.rows(index)
        if draw is None:
            keys = [_key(self._seed, VALIDATION, int(row)) for row in index]
            draws = [_uniform(key, 1, self.seq_len) for key in keys]
            u_3xBxT = np.concatenate(draws, axis=1) if draws else np.zeros((3, 0, self.seq_len))
        else:
            u_3xBxT = _uniform(_key(self._seed, *draw), len(index), self.seq_len)
        return noised(x_BxT, next_BxT != NO_TARGET, u_3xBxT, self._layout, self._end)

    def must_be_below(self, vocab_size: int) -> None:
        """As in `Rows`."""
        self._windows.must_be_below(vocab_size)


def noised(
    x_BxT: Batch,
    present_BxT: npt.NDArray[np.bool_],
    u_3xBxT: npt.NDArray[Any],
    layout: RowLayout,
    end: int | None = None,
) -> tuple[Batch, Batch]:
    """Text with noise, and its targets.

    Args:
        x_BxT: token ids.
        present_BxT: False where a row is padding.
        u_3xBxT: uniform numbers in [0, 1): whether a token is chosen, what happens to it, and by which random
            token it is replaced.
        layout: has the ids of special tokens.
        end: as in `MaskedRows`: where documents end must stay to be seen.

    Returns:
        int32 (B, T) each; targets are -1 where nothing is predicted.
    """
    choice, fate, other = u_3xBxT
    chosen = present_BxT & (choice < CHOSEN)
    random_BxT = (other * layout.tokenizer_vocab).astype(np.int32)
    if end is not None:
        chosen &= x_BxT != end
        random_BxT = np.where(random_BxT == end, (end + 1) % layout.tokenizer_vocab, random_BxT)
    changed = np.where(fate < HIDDEN, layout.mask, np.where(fate < HIDDEN + RANDOM, random_BxT, x_BxT))
    x = np.where(chosen, changed, np.where(present_BxT, x_BxT, layout.pad))
    return x.astype(np.int32), np.where(chosen, x_BxT, NO_TARGET).astype(np.int32)


def _key(*words: int) -> int:
    key = 0
    for word in words:
        key = mix(key ^ (word & WORD_MASK))
    return key


def _uniform(key: int, rows: int, tokens: int) -> npt.NDArray[np.float64]:
    """(3, rows, tokens) numbers in [0, 1), by SplitMix64's mixing of a counter: the same on every machine."""
    count: Words = np.arange(3 * rows * tokens, dtype=np.uint64) + np.uint64(1)
    words = mix_words(count ^ np.uint64(key))
    return (words >> np.uint64(11)).astype(np.float64).reshape(3, rows, tokens) * 2.0**-53
