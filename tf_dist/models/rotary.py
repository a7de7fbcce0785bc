"""Rotary position embedding (RoFormer, Su et al. 2021): queries and keys are rotated by their position.

A head's width is K / 2 pairs (i, i + K / 2), as in Llama; pair i turns by theta^(-2 i / K) per token. So a
score depends on the distance of two tokens, not on where they are.

Legend: B rows, T tokens, H heads, K width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.config.rope_scaling import RopeScaling


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotations of one head width.

    Args:
        width: K, even.
        theta: base of the wavelengths.
        scaling: of these, or None.
    """

    width: int
    theta: float
    scaling: RopeScaling | None = None

    def frequencies(self) -> np.ndarray:
        """Angle per token of each pair, (K / 2,) float32."""
        exponents = np.arange(0, self.width, 2, dtype=np.float32) / np.float32(self.width)
        plain = (np.float32(1) / np.float32(self.theta) ** exponents).astype(np.float32)
        return plain if self.scaling is None else self.scaling.frequencies(plain)

    def at(self, places: np.ndarray) -> Rotation:
        """The rotation of tokens at known positions, (T,): constants of a graph."""
        angles_TxP = places.astype(np.float32)[:, None] * self.frequencies()
        wide = angles_TxP.astype(np.float64)
        return Rotation(tf.constant(np.cos(wide), tf.float32), tf.constant(np.sin(wide), tf.float32))

    def at_each(self, places_BxN: Any) -> Rotation:
        """The rotation of tokens whose positions, (B, N), a graph computes."""
        angles_Bx1xNxP = tf.cast(places_BxN, tf.float32)[:, None, :, None] * self.frequencies()
        return Rotation(tf.cos(angles_Bx1xNxP), tf.sin(angles_Bx1xNxP))


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines, float32, of a shape that broadcasts to (B, H, T, K / 2)."""

    cos: Any
    sin: Any

    def of(self, x_BxHxTxK: Any) -> Any:
        """Rotate queries or keys. Computed in float32; the gradient rotates back, in one pass."""

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def run(x: Any) -> Any:
            return self._turned(x, self.sin), lambda dy: self._turned(dy, -self.sin)

        return run(x_BxHxTxK)

    def _turned(self, x: Any, sin: Any) -> Any:
        first, second = tf.split(tf.cast(x, tf.float32), 2, axis=-1)
        turned = tf.concat([first * self.cos - second * sin, second * self.cos + first * sin], axis=-1)
        return tf.cast(turned, x.dtype)
