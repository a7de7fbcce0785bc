"""Exact match and token F1 of answers, as SQuAD has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tf_dist.metrics.pairs import mean, paired
from tf_dist.metrics.words import answer_words


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of rows whose answer equals the reference after SQuAD's normalization (`answer_words`).

    Rajpurkar et al. 2016, arXiv:1606.05250.

    Args:
        predictions: an answer for each row.
        references: the right answers.

    Returns:
        0 to 1 (SQuAD prints percent). Two answers without a word, once normalized, are equal.

    Raises:
        DataError: no rows, or lists of unequal length.
    """
    pairs = paired(predictions, references, "exact_match")
    equal = [answer_words(predicted) == answer_words(right) for predicted, right in pairs]
    return sum(equal) / len(equal)


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over rows of the F1 of words that answer and reference share, in any order (SQuAD).

    Words are those of `answer_words`, counted as often as they occur.

    Args:
        predictions: an answer for each row.
        references: the right answers.

    Returns:
        0 to 1. If a side has no words, 1 if both have none, else 0 (SQuAD 2.0, Rajpurkar et al. 2018).

    Raises:
        DataError: no rows, or lists of unequal length.
    """
    pairs = paired(predictions, references, "f1")
    return mean(_f1(answer_words(predicted), answer_words(right)) for predicted, right in pairs)


def _f1(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:
        return float(predicted == right)
    common = (Counter(predicted) & Counter(right)).total()
    return 2 * common / (len(predicted) + len(right))
