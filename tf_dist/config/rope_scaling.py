"""Rules by which rope's wavelengths are stretched, for rows longer than those that a model was trained on."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np

from tf_dist.errors import UsageError

# Numbers that each rule takes.
RULES = {"linear": ("FACTOR",), "llama3": ("FACTOR", "LOW", "HIGH", "TOKENS")}


@dataclass(frozen=True)
class RopeScaling:
    """One rule.

    Args:
        rule: ``linear``, position interpolation (Chen et al. 2023): every wavelength times ``factor``.
            ``llama3`` (Dubey et al. 2024): only those longer than ``tokens`` / ``low``, and none shorter than
            ``tokens`` / ``high``; in between a mean of both.
        factor: how many times longer the rows are.
        low: of ``llama3``.
        high: of ``llama3``.
        tokens: length of a row in the first training.
    """

    rule: str
    factor: float
    low: float = 0.0
    high: float = 0.0
    tokens: float = 0.0

    @classmethod
    def parsed(cls, text: str) -> RopeScaling | None:
        """The rule that an option says; None: wavelengths as they are.

        Raises:
            UsageError: there is no such rule, or its numbers are none.
        """
        if not text:
            return None
        rule, *numbers = text.split(":")
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = []
        wanted = RULES.get(rule, ())
        if not wanted or len(values) != len(wanted) or not all(0 < value < math.inf for value in values):
            known = ", ".join(":".join([name, *parts]) for name, parts in RULES.items())
            raise UsageError(f"rope_scaling is {text!r}: {known}, with numbers above 0")
        made = cls(rule, *values)
        if rule == "llama3" and not made.low < made.high:
            raise UsageError(f"rope_scaling is {text!r}: LOW must be below HIGH")
        return made

    def __str__(self) -> str:
        numbers = astuple(self)[1 : 1 + len(RULES[self.rule])]
        return ":".join([self.rule, *(f"{number:g}" for number in numbers)])

    def frequencies(self, plain: np.ndarray) -> np.ndarray:
        """Angles per token, float32, of those without scaling."""
        if self.rule == "linear":
            return (plain / np.float32(self.factor)).astype(np.float32)
        periods = 2 * np.pi / plain  # of each rotation, in the first training's rows
        share = (self.tokens / periods - self.low) / (self.high - self.low)
        share = np.clip(share, 0, 1).astype(np.float32)
        return np.asarray((1 - share) * plain / np.float32(self.factor) + share * plain, np.float32)
