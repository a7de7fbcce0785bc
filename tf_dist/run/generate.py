"""Generates text with a trained model, token by token.

Works with any causal model from token ids (B, T) to logits (B, T, V): with a cache if its layers have one
(`tf_dist.models.incremental`), else from the whole window for each token. `tf_dist.decoding.rows` says what
happens once a window of T tokens is full.
"""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np

from tf_dist.decoding.decode import sample
from tf_dist.decoding.forward import CachedForward
from tf_dist.decoding.sampling import Sampling, choose
from tf_dist.runners.decoding_forward import forward_of_model

__all__ = ["Sampling", "choose", "continuation", "generate"]


def generate(
    model: keras.Model, seq_len: int, prompt_ids: np.ndarray, count: int, sampling: Sampling
) -> Iterator[int]:
    """Yield ``count`` token ids that follow ``prompt_ids``.

    Args:
        model: token ids (B, T) int32 -> logits (B, T, V), causal.
        seq_len: T.
        prompt_ids: 1-D, at least one id.
        count: how many to make.
        sampling: how they are chosen.

    Raises:
        UsageError: the prompt is empty.
    """
    yield from continuation(forward_of_model(model, seq_len), prompt_ids, count, sampling)


def continuation(
    forward: CachedForward, prompt_ids: np.ndarray, count: int, sampling: Sampling, end: int | None = None
) -> Iterator[int]:
    """As `generate`, with what computes the logits; up to the token ``end``, if one is given.

    Ranks that share a model call it together, and sample the same tokens.
    """
    for new_B, _ in sample(forward, [prompt_ids], sampling, count, end):
        yield int(new_B[0])
