"""Mixtures of corpora: each row of training is drawn from one of them, in given shares.

Which corpus a row is drawn from, and which of its sequences it is, are functions of the row's number and the
seed alone, as in `tf_dist.data.sampler`: nothing random is saved, and any rank can compute any step. Rows
take turns as evenly as whole numbers allow (Bresenham's line, nested for more than two corpora), so that each
global batch has the shares; within a corpus each pass has its own permutation.

Legend: n sequences, B rows of a batch, G of a global batch, T tokens of a row.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tf_dist.data.rows import Rows
from tf_dist.data.sampler import MASK, Indices, Permutation, Sampler, mix
from tf_dist.data.tokens import NO_SEQUENCE, NO_TARGET, Batch, Sequences
from tf_dist.errors import DataError, UsageError

WEIGHTED = re.compile(r"(.+):([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)")
# Weights are whole numbers of 1 / SCALE: products with row numbers below 2^38 fit 64 bits.
SCALE = 1 << 24


def with_weights(values: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """``--data`` values as sources and weights; no weights if no value ends with one, as in ``a.jsonl:0.7``.

    A value that names an existing file, with its colon and number, is that file, without a weight.

    Returns:
        The sources, and their weights, which add up to 1; or no weights.

    Raises:
        UsageError: a weight is not positive, or some values have one and others have none.
    """
    found = [_weighted(value) for value in values]
    sources, weights = tuple(source for source, _ in found), [weight for _, weight in found]
    given = [weight for weight in weights if weight is not None]
    if not given:
        return sources, ()
    if len(given) < len(weights):
        bare = sources[weights.index(None)]
        raise UsageError(
            f"--data {bare} has no weight, and other values have one: give each its weight, as in "
            f"{bare}:0.3, or give none"
        )
    return sources, tuple(weight / math.fsum(given) for weight in given)


def _weighted(value: str) -> tuple[str, float | None]:
    match = WEIGHTED.fullmatch(value)
    if match is None or Path(value).exists() or Path(value).is_symlink() or glob.glob(value):
        return value, None
    weight = float(match[2])
    if not 0 < weight < math.inf:
        raise UsageError(f"--data {value}: the weight of {match[1]} is {match[2]}; it must be above 0")
    return match[1], weight


@dataclass(frozen=True)
class MixturePart:
    """A corpus of a mixture. name: in keys and messages. weight: its share. first, rows: its sequences."""

    name: str
    weight: float
    first: int
    rows: int


class Mixture:
    """Corpora and their shares.

    Args:
        parts: in the order of their sequences; weights are positive, and normalized here.

    Attributes:
        parts: with normalized weights.
    """

    def __init__(self, parts: Sequence[MixturePart]) -> None:
        total = math.fsum(part.weight for part in parts)
        self.parts = tuple(
            MixturePart(part.name, part.weight / total, part.first, part.rows) for part in parts
        )
        self._units = [max(1, round(part.weight * SCALE)) for part in self.parts]

    def __len__(self) -> int:
        """Sequences of all corpora."""
        return sum(part.rows for part in self.parts)

    def drawn(self, rows: Indices) -> list[tuple[npt.NDArray[np.bool_], Indices]]:
        """Of which corpus each row of training is, and its number among the rows of that corpus.

        Args:
            rows: numbers, from 0, over the whole training.

        Returns:
            For each corpus: which rows are of it, shape of ``rows``; and, for every row, how many rows before
            it are of that corpus.
        """
        found: list[tuple[npt.NDArray[np.bool_], Indices]] = []
        left, after = np.array(rows, np.int64), np.array(rows, np.int64) + 1
        for number, own in enumerate(self._units):
            rest = sum(self._units[number:])
            before, now = ((2 * own * count + rest) // (2 * rest) for count in (left, after))
            found.append((now > before, before))
            left, after = left - before, after - now
        return found

    def counts(self, rows: int) -> list[int]:
        """How many of the first rows of training are of each corpus."""
        return [int(before[0]) for _, before in self.drawn(np.array([rows]))]

    def passes(self, rows: int) -> dict[str, float]:
        """How often each corpus was read in the first rows of training, by name."""
        pairs = zip(self.parts, self.counts(rows), strict=True)
        return {part.name: count / part.rows for part, count in pairs}


class MixtureSampler(Sampler):
    """The order of training on a mixture: an epoch has as many rows as there are sequences of all corpora.

    Batches are full: rows are counted on over the ends of epochs.

    Args:
        mixture: of the data.
        global_batch_size: G.
        seed: chooses the order in each corpus.
    """

    def __init__(self, mixture: Mixture, global_batch_size: int, seed: int) -> None:
        super().__init__(len(mixture), global_batch_size, seed)
        self.mixture = mixture
        self._seeds = [mix(mix(seed & MASK) ^ number) for number in range(len(mixture.parts))]

    def _batches(self, epoch: int, first_step: int) -> Indices:
        first = (epoch * self.steps_per_epoch + first_step) * self.global_batch_size
        rows = np.arange(first, first + self._block_steps * self.global_batch_size, dtype=np.int64)
        indices = np.empty(rows.size, dtype=np.int64)
        drawn = zip(self.mixture.drawn(rows), self.mixture.parts, self._seeds, strict=True)
        for (own, before), part, seed in drawn:
            passes, places = np.divmod(before[own], part.rows)
            inside = np.empty(places.size, dtype=np.int64)
            for number in np.unique(passes):
                now = passes == number
                inside[now] = Permutation(part.rows, seed, int(number))(places[now])
            indices[own] = part.first + inside
        return indices.reshape(-1, self.global_batch_size)


class MixtureRows:
    """Windows of several corpora, whose tokens stand one after the other; no window has tokens of two.

    Args:
        tokens: of all corpora.
        seq_len: T.
        parts: name, weight and number of tokens of each.

    Attributes:
        mixture: of these.
    """

    def __init__(
        self, tokens: npt.NDArray[Any], seq_len: int, parts: Sequence[tuple[str, float, int]]
    ) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self._windows: list[Sequences] = []
        made, place, first = list[MixturePart](), 0, 0
        for name, weight, count in parts:
            self._windows.append(Sequences(tokens[place : place + count], seq_len))
            made.append(MixturePart(name, weight, first, len(self._windows[-1])))
            place, first = place + count, first + made[-1].rows
        self.mixture = Mixture(made)

    def __len__(self) -> int:
        return len(self.mixture)

    def rows(self, indices: npt.ArrayLike, draw: tuple[int, int] | None = None) -> tuple[Batch, Batch]:
        """As in `Rows`; nothing is random.

        Raises:
            IndexError: no such window.
        """
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if index.size and not (NO_SEQUENCE <= index.min() and index.max() < len(self)):
            raise IndexError(f"windows {index.min()} to {index.max()} asked for, there are {len(self)}")
        x_BxT = np.zeros((len(index), self.seq_len), np.int32)
        y_BxT = np.full_like(x_BxT, NO_TARGET)
        for part, windows in zip(self.mixture.parts, self._windows, strict=True):
            own = (part.first <= index) & (index < part.first + part.rows)
            if own.any():
                x_BxT[own], y_BxT[own] = windows.rows(index[own] - part.first)
        return x_BxT, y_BxT

    def must_be_below(self, vocab_size: int) -> None:
        """As in `Rows`."""
        for windows in self._windows:
            windows.must_be_below(vocab_size)


class RowsOfPart:
    """The rows of one corpus of a mixture.

    Args:
        rows: of the mixture.
        part: the corpus.
    """

    def __init__(self, rows: Rows, part: MixturePart) -> None:
        self.tokens, self.seq_len = rows.tokens, rows.seq_len
        self._rows, self._part = rows, part

    def __len__(self) -> int:
        return self._part.rows

    def rows(self, indices: npt.ArrayLike, draw: tuple[int, int] | None = None) -> tuple[Batch, Batch]:
        """As in `Rows`."""
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        return self._rows.rows(np.where(index < 0, NO_SEQUENCE, index + self._part.first), draw)

    def must_be_below(self, vocab_size: int) -> None:
        """As in `Rows`."""
        self._rows.must_be_below(vocab_size)


def mixture_of(rows: Rows) -> Mixture | None:
    """The mixture that rows are of, also where they are changed on their way; None: of one corpus."""
    found: Mixture | None = getattr(rows, "mixture", None)
    return found


def sampler_of(rows: Rows, global_batch_size: int, seed: int) -> Sampler:
    """The order in which rows are trained on.

    Args:
        rows: to train on.
        global_batch_size: G.
        seed: of the order.

    Raises:
        DataError: a corpus of a mixture has no row.
    """
    mixture = mixture_of(rows)
    if mixture is None:
        return Sampler(len(rows), global_batch_size, seed)
    empty = [part.name for part in mixture.parts if not part.rows]
    if empty:
        raise DataError(f"corpus {empty[0]} of the mixture has no two tokens to train on. Leave it out")
    return MixtureSampler(mixture, global_batch_size, seed)
