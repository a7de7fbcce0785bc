"""BLEU and chrF of translations and captions, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tf_dist.metrics.pairs import library, paired


def bleu(predictions: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> float:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it (Post 2018, arXiv:1804.08771).

    Geometric mean of the precisions of 1- to 4-grams over the whole corpus, times the brevity penalty;
    detokenized text, case matters, smoothing "exp". Where no row has four words, BLEU is 0 even if all rows
    are right: use chrF for single words. `bleu_signature` names the settings; publish it with the value.

    Args:
        predictions: a text for each row; may be empty.
        references: one right text for each row.
        tokenize: of sacrebleu: ``13a`` for languages with spaces, ``zh`` for Chinese, ``char``.

    Returns:
        0 to 100.

    Raises:
        DataError: no rows, or lists of unequal length.
        BackendMissing: sacrebleu is not installed.
    """
    paired(predictions, references, "bleu")
    return _score(_bleu(tokenize), predictions, references)


def bleu_zh(predictions: Sequence[str], references: Sequence[str]) -> float:
    """`bleu` with sacrebleu's tokenizer for Chinese; "13a" would take a whole sentence for one word."""
    return bleu(predictions, references, tokenize="zh")


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 (Popović 2015) as sacrebleu computes it: F-score, beta 2, of character 1- to 6-grams.

    Spaces are ignored, case matters; no word n-grams (that would be chrF++).

    Args:
        predictions: a text for each row; may be empty.
        references: one right text for each row.

    Returns:
        0 to 100. 0 if all texts are empty.

    Raises:
        DataError: no rows, or lists of unequal length.
        BackendMissing: sacrebleu is not installed.
    """
    paired(predictions, references, "chrf")
    return _score(_chrf(), predictions, references)


def bleu_signature(tokenize: str = "13a") -> str:
    """The settings and version behind `bleu`, in sacrebleu's notation. Raises `BackendMissing`."""
    return _signature(_bleu(tokenize))


def chrf_signature() -> str:
    """The settings and version behind `chrf`, in sacrebleu's notation. Raises `BackendMissing`."""
    return _signature(_chrf())


def _bleu(tokenize: str) -> Any:
    # force: no warning about text that looks tokenized, which would come once per validation.
    return library("sacrebleu", "bleu").BLEU(tokenize=tokenize, force=True)


def _chrf() -> Any:
    return library("sacrebleu", "chrf").CHRF(char_order=6, word_order=0, beta=2)


def _score(scorer: Any, predictions: Sequence[str], references: Sequence[str]) -> float:
    return float(scorer.corpus_score(list(predictions), [list(references)]).score)


def _signature(scorer: Any) -> str:
    _score(scorer, ["one"], ["one"])  # the number of references is a part of it
    return str(scorer.get_signature())
