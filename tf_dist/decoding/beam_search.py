"""Beam search with a length penalty (Wu et al. 2016, section 7).

Legend: B rows, K beams of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tf_dist.decoding.decoded import Decoded
from tf_dist.decoding.forward import CachedForward
from tf_dist.decoding.rows import DecodedRows
from tf_dist.decoding.sampling import log_softmax
from tf_dist.errors import UsageError


@dataclass(frozen=True)
class BeamSearch:
    """Keep the ``beams`` likeliest continuations of each row, and take the one of the best score.

    The score of a continuation Y is log P(Y) / ((5 + |Y|) / 6) ** length_penalty; |Y| counts its end of text.

    A continuation that ends is kept if it is among the K likeliest of a step. The search is over when no
    live beam can come to a better score. With one beam and no end of text it is greedy.

    beams: K.
    length_penalty: 0 compares probabilities alone, which favours short texts; 0.6 in the paper.

    Raises:
        UsageError: a value out of range.
    """

    beams: int = 4
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        if self.beams < 1 or not 0 <= self.length_penalty < float("inf"):
            raise UsageError(f"beams >= 1 and length_penalty >= 0 are needed, not {self}")

    def score(self, log_probability: float, length: int) -> float:
        """The score of a continuation of ``length`` tokens."""
        return float(log_probability / ((5 + length) / 6) ** self.length_penalty)


@dataclass
class _Row:
    """The beams of one row.

    live: log probability of each beam, (K,); -inf: there is none. ended: the best continuations so far that
    have ended, at most K. done: no live beam can become better than the best of these.
    """

    live: np.ndarray
    ended: list[Decoded] = field(default_factory=list)
    done: bool = False


class _Search:
    """A beam search over the rows of a batch, whose beams are the rows of `DecodedRows`."""

    def __init__(
        self, search: BeamSearch, rows: DecodedRows, batch: int, count: int, end: int | None
    ) -> None:
        self._search, self._rows, self._count, self._end = search, rows, count, end
        self._prompt = [len(rows.tokens[row * search.beams]) for row in range(batch)]
        only_first = np.full(search.beams, -np.inf)  # all beams are equal: one is enough
        only_first[0] = 0.0
        self._of = [_Row(only_first.copy()) for _ in range(batch)]

    def run(self) -> list[Decoded]:
        K = self._search.beams
        for length in range(1, self._count + 1):
            log_BKxV = log_softmax(self._rows.logits_BxV)
            chosen = [
                self._extend(row, log_BKxV[row * K : (row + 1) * K], length) for row in range(len(self._of))
            ]
            source = np.concatenate([row * K + beams for row, (beams, _) in enumerate(chosen)])
            if not np.array_equal(source, np.arange(len(source))):
                self._rows.select(source)
            going = np.repeat([not one.done for one in self._of], K)
            if length == self._count or not going.any():
                self._add_last_tokens(chosen)
                break
            self._rows.append(np.concatenate([tokens for _, tokens in chosen]), going)
        return [self._best(row) for row in range(len(self._of))]

    def _extend(self, row: int, log_KxV: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The beams of a row with one more token: which beam each extends, and by which token."""
        one, K = self._of[row], self._search.beams
        if one.done:
            return np.arange(K), np.zeros(K, np.int64)
        total_KV = (one.live[:, None] + log_KxV).reshape(-1)
        # Each beam has one candidate that ends it, so K of these go on, if the vocabulary has so many.
        order = _largest(total_KV, 2 * K)
        beams, tokens = np.divmod(order, log_KxV.shape[1])
        ends = np.zeros(len(order), bool) if self._end is None else tokens == self._end
        for place in np.flatnonzero(ends[:K] & np.isfinite(total_KV[order[:K]])):
            self._note_end(row, int(beams[place]), float(total_KV[order[place]]), length)
        on = np.flatnonzero(~ends)[:K]
        live = np.full(K, -np.inf)
        live[: len(on)] = total_KV[order[on]]
        one.live = live
        # log P only falls: the best a live beam can come to is its own, at the greatest length.
        hope = self._search.score(float(live[0]), self._count)
        one.done = bool(one.ended) and one.ended[0].score >= hope
        missing = (0, K - len(on))
        return np.pad(beams[on], missing), np.pad(tokens[on], missing)

    def _note_end(self, row: int, beam: int, log_probability: float, length: int) -> None:
        tokens = self._rows.tokens[row * self._search.beams + beam][self._prompt[row] :]
        score = self._search.score(log_probability, length)
        one = self._of[row]
        one.ended.append(Decoded(tuple(tokens), log_probability, score, True))
        one.ended = sorted(one.ended, key=lambda each: -each.score)[: self._search.beams]

    def _add_last_tokens(self, chosen: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Append the last token to the beams; no logits are needed any more."""
        K = self._search.beams
        for row, (_, tokens) in enumerate(chosen):
            for beam, token in enumerate(tokens):
                if not self._of[row].done:
                    self._rows.tokens[row * K + beam].append(int(token))

    def _best(self, row: int) -> Decoded:
        """The continuation of the best score, ended or not; of equal ones that which has ended."""
        one, K = self._of[row], self._search.beams
        found = list(one.ended)
        if not one.done and np.isfinite(one.live[0]):
            tokens = self._rows.tokens[row * K][self._prompt[row] :]
            score = self._search.score(float(one.live[0]), len(tokens))
            found.append(Decoded(tuple(tokens), float(one.live[0]), score, False))
        return max(found, key=lambda each: each.score)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the largest values are, from the largest on; of equal ones the first is first."""
    found = np.argpartition(-values, count)[:count] if count < len(values) else np.arange(len(values))
    return found[np.lexsort((found, -values[found]))]


def beam_search(
    forward: CachedForward,
    prompts: Sequence[Sequence[int] | np.ndarray],
    search: BeamSearch,
    count: int,
    end: int | None = None,
) -> list[Decoded]:
    """The continuation of the best score that the search finds, for each prompt.

    Args:
        forward: the model; B K rows at once.
        prompts: token ids, at least one each.
        search: how many beams, and how they are compared.
        count: tokens of a continuation, at most; at least 1.
        end: the token that ends a text, which is not part of it; None: there is none.
    """
    rows = DecodedRows(forward, prompts, count)
    rows.select(np.repeat(np.arange(len(prompts)), search.beams))
    return _Search(search, rows, len(prompts), count, end).run()
