"""Sizes of a model's body, and what kind of layers it has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tf_dist.config.transformer import TransformerOptions

GPT2 = TransformerOptions()


@dataclass(frozen=True)
class BodySizes:
    """Sizes of a model.

    Args:
        layers: L.
        width: D.
        heads: H.
        dropout: rate.
        tie_embeddings: with the head.
        kind: of a Transformer's layers.
    """

    layers: int
    width: int
    heads: int = 1
    dropout: float = 0.0
    tie_embeddings: bool = True
    kind: TransformerOptions = GPT2

    @property
    def residual_stddev(self) -> float:
        """Initial weights of projections to the residual stream, see `tf_dist.models.transformer.build`."""
        return float(0.02 / (2 * self.layers) ** 0.5)


def described(kind: TransformerOptions) -> dict[str, Any]:
    """The argument of a layer's constructor, as plain values; none for the default: older files have none."""
    return {} if kind == GPT2 else {"kind": dataclasses.asdict(kind)}
