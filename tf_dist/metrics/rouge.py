"""ROUGE-L of summaries, by a bit-parallel longest common subsequence."""

from __future__ import annotations

from collections.abc import Sequence

from tf_dist.metrics.pairs import mean, paired
from tf_dist.metrics.words import words


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over rows of ROUGE-L F1 (Lin 2004): how much of the words is a common subsequence, in order.

    With L the length of the longest common subsequence of words: ``P = L / |prediction|``,
    ``R = L / |reference|``, ``F = 2 P R / (P + R)``; the text of a row is one sequence, not a union over
    sentences (ROUGE-Lsum). Of English text this is ``rougeL`` ``fmeasure`` of Google's ``rouge_score``
    without stemming; that package drops letters that are not ASCII, so other languages need `words`.

    Args:
        predictions: a text for each row.
        references: one right text for each row.

    Returns:
        0 to 1. A row in which a side has no words counts 0, also if both have none (as ``rouge_score``).

    Raises:
        DataError: no rows, or lists of unequal length.
    """
    pairs = paired(predictions, references, "rouge_l")
    return mean(_f1(words(predicted), words(right)) for predicted, right in pairs)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, bit-parallel: a row of the dynamic program is one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    everything = (1 << len(first)) - 1
    row = everything  # a zero bit is a step of the row, from L to L + 1
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(first) - row.bit_count()


def _f1(predicted: list[str], right: list[str]) -> float:
    common = longest_common_subsequence(predicted, right)
    # 2 P R / (P + R), without a division by zero.
    return 2 * common / (len(predicted) + len(right)) if common else 0.0
