"""Keys and values of earlier positions, and attention of new positions to them.

Legend: B rows, N new positions of a call, L positions of a cache, H heads, K width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from tf_dist.models.attention import MASKED, repeat_heads
from tf_dist.models.incremental import Span


class KeyValueCache(NamedTuple):
    """Keys and values, (B, H, L, K) each, of which those of positions not seen yet have no meaning."""

    k_BxHxLxK: Any
    v_BxHxLxK: Any

    def written(self, k_BxHxNxK: Any, v_BxHxNxK: Any, span: Span) -> KeyValueCache:
        """The cache with those of new positions, all of which must be below L.

        Padding is written too: nobody attends to it before it is overwritten.
        """
        B, H, N, _ = k_BxHxNxK.shape
        places_BxHxN = tf.broadcast_to(span.positions(N)[:, None], (B, H, N))
        rows_BxHxN = tf.broadcast_to(tf.range(B)[:, None, None], (B, H, N))
        heads_BxHxN = tf.broadcast_to(tf.range(H)[None, :, None], (B, H, N))
        where = tf.stack([rows_BxHxN, heads_BxHxN, places_BxHxN], axis=-1)
        return KeyValueCache(
            tf.tensor_scatter_nd_update(self.k_BxHxLxK, where, k_BxHxNxK),
            tf.tensor_scatter_nd_update(self.v_BxHxLxK, where, v_BxHxNxK),
        )


def empty(batch: int, heads: int, length: int, width: int, dtype: str) -> KeyValueCache:
    """A cache of B rows, for L positions."""
    zeros = tf.zeros((batch, heads, length, width), dtype)
    return KeyValueCache(zeros, zeros)


@dataclass(frozen=True)
class BiasOfAll:
    """A bias that is given once, with the first positions: (B, 1, Q, Q) of all Q positions of a row.

    What it hides from the last position, as padding of a source, stays hidden from those that come later.
    """

    bias: Any


def no_bias(batch: int, length: int) -> Any:
    """The bias of L cached positions that all are seen, (B, 1, 1, L) float32."""
    return tf.zeros((batch, 1, 1, length))


def padded_bias(bias_Bx1xQxN: Any, length: int, beyond: float) -> Any:
    """A bias of the first N keys for all L, (B, 1, Q, L); ``beyond`` is that of the others."""
    more = length - bias_Bx1xQxN.shape[3]
    return tf.pad(bias_Bx1xQxN, ((0, 0), (0, 0), (0, 0), (0, more)), constant_values=beyond)


def causal_bias(span: Span, new: int, length: int, dtype: Any, window: int = 0) -> Any:
    """What is added to scores so that a new position attends to itself and to those before, (B, 1, N, L).

    ``window``: to so many at most, itself included; 0: to all.
    """
    places_Bx1xNx1 = span.positions(new)[:, None, :, None]
    hidden = tf.range(length) > places_Bx1xNx1
    if window:
        hidden |= tf.range(length) <= places_Bx1xNx1 - window
    return tf.where(hidden, tf.constant(MASKED, dtype), tf.constant(0, dtype))


def cached_attention(q_BxHxNxK: Any, cache: KeyValueCache, bias_Bx1xNxL: Any) -> Any:
    """Attention of new positions to cached ones, (B, H, N, K).

    Args:
        q_BxHxNxK: queries of new positions.
        cache: with their keys and values, of as many heads or fewer.
        bias_Bx1xNxL: added to scores: `causal_bias`, another mask, or their sum.
    """
    # Scaled before the product, as in `attention.py`.
    heads = q_BxHxNxK.shape[1]
    q_BxHxNxK = q_BxHxNxK * q_BxHxNxK.shape[3] ** -0.5
    k_BxHxLxK, v_BxHxLxK = (repeat_heads(one, heads) for one in cache)
    scores_BxHxNxL = tf.matmul(q_BxHxNxK, k_BxHxLxK, transpose_b=True) + bias_Bx1xNxL
    return tf.matmul(tf.nn.softmax(scores_BxHxNxL), v_BxHxLxK)
