"""Perplexity, and pseudo-perplexity of masked language models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tf_dist.errors import DataError
from tf_dist.metrics.pairs import paired


def perplexity(nll_sums: Sequence[float], token_counts: Sequence[int]) -> float:
    """Exponential of the mean negative log-likelihood per token, over the tokens of all rows.

    ``PPL = exp(-1/N sum_i log p(w_i | w_<i))`` (Jelinek et al. 1977): one mean over all N tokens, and not a
    mean of rows, so long rows count for more.

    Args:
        nll_sums: of each row, the sum of -log p over its target tokens, in nats (the predictions).
        token_counts: of each row, how many tokens that sum has (the references); may be 0.

    Returns:
        1 (certain and right) to infinity, also where exp overflows; NaN if a sum is NaN.

    Raises:
        DataError: no rows, no tokens, or lists of unequal length.
    """
    return _exp_of_mean(nll_sums, token_counts, "perplexity")


def pseudo_perplexity(nll_sums: Sequence[float], token_counts: Sequence[int]) -> float:
    """Exponential of the mean negative pseudo-log-likelihood per token of a masked language model.

    ``PPPL = exp(-1/N sum_i log p(w_i | all other words))``, where w_i alone is masked (Salazar et al. 2020,
    arXiv:1910.14659). Values of two models compare only if their vocabularies are equal, and none compares
    with a perplexity: each token is predicted from both sides.

    Args:
        nll_sums: of each row, the sum over its tokens of -log p in nats, each token masked in turn.
        token_counts: of each row, how many tokens were masked in turn.

    Returns:
        As of `perplexity`.

    Raises:
        DataError: no rows, no tokens, or lists of unequal length.
    """
    return _exp_of_mean(nll_sums, token_counts, "pseudo_perplexity")


def _exp_of_mean(nll_sums: Sequence[float], token_counts: Sequence[int], metric: str) -> float:
    paired(nll_sums, token_counts, metric)
    tokens = sum(token_counts)
    if tokens <= 0:
        raise DataError(f"{metric} of no tokens is undefined. Hold out rows with at least one target token.")
    try:
        return math.exp(math.fsum(nll_sums) / tokens)
    except OverflowError:
        return math.inf
