"""Accuracy and macro-F1 of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from tf_dist.metrics.pairs import mean, paired


def accuracy(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """Share of rows whose predicted label is the reference.

    Args:
        predictions: a label for each row: numbers or texts. Of several targets in a row (tokens of a masked
            LM), pass them flat, without those that are ignored.
        references: the right labels.

    Returns:
        0 to 1.

    Raises:
        DataError: no rows, or lists of unequal length.
    """
    pairs = paired(predictions, references, "accuracy")
    return sum(predicted == right for predicted, right in pairs) / len(pairs)


def macro_f1(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """Unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN).

    Classes are those that occur in the predictions or the references; a class that occurs in neither does
    not count. This is scikit-learn's ``f1_score(references, predictions, average="macro")``, and not the F1
    of averaged precision and recall (Opitz and Burst 2019, arXiv:1911.03347, compare both).

    Args:
        predictions: a label for each row.
        references: the right labels.

    Returns:
        0 to 1. A class that is only predicted, or never, has F1 0.

    Raises:
        DataError: no rows, or lists of unequal length.
    """
    pairs = paired(predictions, references, "macro_f1")
    predicted, right = Counter(predictions), Counter(references)
    hits = Counter(label for label, reference in pairs if label == reference)
    # TP + FP is how often a class was predicted, TP + FN how often it is right.
    classes = predicted.keys() | right.keys()
    return mean(2 * hits[one] / (predicted[one] + right[one]) for one in classes)
