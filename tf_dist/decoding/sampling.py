"""How the next token is drawn from its logits.

Legend: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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

    def generator(self, row: int) -> np.random.Generator:
        """The random numbers of a row: of nothing but the seed and its number, counted from 0."""
        # Row 0 has those of the seed alone: NumPy fills the entropy up with zeros.
        return np.random.default_rng([self.seed, row])


GREEDY = Sampling(temperature=0.0)


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


def log_softmax(logits_BxV: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities, (B, V) float64."""
    shifted = logits_BxV - logits_BxV.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
