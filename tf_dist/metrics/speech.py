"""Word and character error rate of transcripts, by jiwer."""

from __future__ import annotations

from collections.abc import Sequence

from tf_dist.errors import DataError
from tf_dist.metrics.pairs import library, paired


def wer(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Word error rate: (substitutions + deletions + insertions) / words of the references, over all rows.

    Least edits by Levenshtein's distance of words (Morris et al. 2004 discuss it). Words are separated by
    white space; case and punctuation matter, so normalize both sides first. Text without spaces (Chinese,
    Japanese) is one word: use `cer`.

    Args:
        predictions: a transcript for each row; may be empty.
        references: the right transcripts. An empty one adds insertions, and no words.

    Returns:
        0 (perfect) upwards, above 1 where there are many insertions.

    Raises:
        DataError: no rows, lists of unequal length, or no word in any reference.
        BackendMissing: jiwer is not installed.
    """
    spoken, right = _texts(predictions, references, "wer")
    return float(library("jiwer", "wer").wer(right, spoken))


def cer(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Character error rate: `wer` of characters (code points) instead of words.

    A space between words is a character; a run of white space counts as one space, and none counts at the
    ends.

    Args:
        predictions: a transcript for each row; may be empty.
        references: the right transcripts.

    Returns:
        0 (perfect) upwards.

    Raises:
        DataError: no rows, lists of unequal length, or no character in any reference.
        BackendMissing: jiwer is not installed.
    """
    spoken, right = _texts(predictions, references, "cer")
    return float(library("jiwer", "cer").cer(right, spoken))


def _texts(predictions: Sequence[str], references: Sequence[str], metric: str) -> tuple[list[str], list[str]]:
    paired(predictions, references, metric)
    # jiwer splits at spaces alone: a tab or a line feed would glue two words together.
    spoken, right = ([" ".join(text.split()) for text in texts] for texts in (predictions, references))
    if not any(right):
        raise DataError(
            f"{metric}: all {len(right):,} references are empty. Hold out rows with a transcript."
        )
    return spoken, right
