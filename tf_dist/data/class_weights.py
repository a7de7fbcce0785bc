"""Weights of classes in the loss, from how often each one is in the training rows. Legend: C classes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tf_dist.errors import UsageError

KINDS = ("none", "balanced")


def class_weights(counts: npt.NDArray[np.int64], kind: str) -> npt.NDArray[np.float64]:
    """The weight of each class; over the training rows their mean is 1.

    Args:
        counts: training rows of each class, shape (C,).
        kind: ``none``: all 1; ``balanced``: in inverse proportion to the counts (King & Zeng, *Logistic
            Regression in Rare Events Data*, 2001; scikit-learn's formula over the classes that occur).

    Returns:
        Weights of shape (C,); 0 for a class without rows, which no row can use.

    Raises:
        UsageError: an unknown kind, or no row at all.
    """
    if kind not in KINDS:
        raise UsageError(f"class weights {kind!r} are unknown: use one of {' '.join(KINDS)}.")
    counts = np.asarray(counts)
    if kind == "none":
        return np.ones(len(counts))
    present = counts > 0
    if not present.any():
        raise UsageError("balanced class weights need training rows, and there are none.")
    weights = np.zeros(len(counts))
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights
