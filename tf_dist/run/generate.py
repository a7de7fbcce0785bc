"""Generates text with a trained model, token by token.

Works with any causal model from token ids (1, T) to logits (1, T, V): the window is padded on the
right, which a causal model ignores, and slides once it is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from tf_dist.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: logits are divided by it; 0 takes the likeliest token (greedy).
    top_k: choose among the k likeliest tokens only; 0 for all.
    top_p: choose among the likeliest tokens that together have this probability (Holtzman et al. 2020).
    seed: of the choice.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and self.seed >= 0):
            raise UsageError(
                f"temperature >= 0, top_k >= 0, 0 < top_p <= 1 and seed >= 0 are needed, not {self}"
            )


def generate(
    model: keras.Model, seq_len: int, prompt_ids: np.ndarray, count: int, sampling: Sampling
) -> Iterator[int]:
    """Yield ``count`` token ids that follow ``prompt_ids``.

    Args:
        model: token ids (1, T) int32 -> logits (1, T, V), causal.
        seq_len: T.
        prompt_ids: 1-D, at least one id.
        count: how many to make.
        sampling: how they are chosen.

    Raises:
        UsageError: the prompt is empty.
    """
    logits_at = tf.function(
        lambda window_1xT, place: tf.cast(model(window_1xT, training=False)[0, place], tf.float32),
        input_signature=[tf.TensorSpec((1, seq_len), tf.int32), tf.TensorSpec((), tf.int32)],
    )
    yield from write_on(logits_at, seq_len, prompt_ids, count, sampling)


def write_on(
    logits_at: Callable[[np.ndarray, int], np.ndarray | tf.Tensor],
    seq_len: int,
    prompt_ids: np.ndarray,
    count: int,
    sampling: Sampling,
) -> Iterator[int]:
    """As `generate`, with a function from token ids (1, T) and a position in them to logits (V,).

    Ranks that share a model call it together, and sample the same tokens.
    """
    if len(prompt_ids) == 0:
        raise UsageError("the prompt is empty: give at least one character")
    random = np.random.default_rng(sampling.seed)
    ids = [int(i) for i in prompt_ids]
    for _ in range(count):
        recent = ids[-seq_len:]
        window_1xT = np.zeros((1, seq_len), np.int32)
        window_1xT[0, : len(recent)] = recent
        logits_V = np.asarray(logits_at(window_1xT, len(recent) - 1), np.float64)
        ids.append(choose(logits_V, sampling, random))
        yield ids[-1]


def choose(logits_V: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """Draw a token id from logits, (V,) float64."""
    if sampling.temperature == 0:
        return int(np.argmax(logits_V))
    order = np.argsort(-logits_V, kind="stable")
    scaled = (logits_V[order] - logits_V[order[0]]) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    kept = len(order) if sampling.top_k == 0 else min(sampling.top_k, len(order))
    # The token that crosses top_p belongs to the nucleus, so that it is never empty.
    nucleus = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
    kept = max(1, min(kept, nucleus))
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    return int(order[random.choice(kept, p=probabilities)])
