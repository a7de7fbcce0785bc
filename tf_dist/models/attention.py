"""Causal attention with gradients written by hand, for short sequences.

Legend: B rows, T tokens, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

# Added to the scores of later tokens. Not -inf: a row is never empty, and no NaN can come of 0 x inf.
MASKED = -1e9


def split_heads(qkv_BxTx3D: Any, heads: int) -> list[Any]:
    """Queries, keys and values, (B, H, T, K) each, from one projection.

    One transpose each way. TensorFlow's gradient of taking a part out of an array is as large as the array,
    zero everywhere else, and slow: three of them, and two sums, took a quarter of a small GPT's step.
    """
    T, K = qkv_BxTx3D.shape[1], qkv_BxTx3D.shape[2] // (3 * heads)

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(qkv_BxTx3D: Any) -> Any:
        parts = tf.reshape(qkv_BxTx3D, (-1, T, 3, heads, K))
        parts_3xBxHxTxK = tf.transpose(parts, (2, 0, 3, 1, 4))

        def gradient(*dparts_BxHxTxK: Any) -> Any:
            dparts = tf.transpose(tf.stack(dparts_BxHxTxK), (1, 3, 0, 2, 4))
            return tf.reshape(dparts, (-1, T, 3 * heads * K))

        return tf.unstack(parts_3xBxHxTxK), gradient

    return list(run(qkv_BxTx3D))


def join_heads(x_BxHxTxK: Any) -> Any:
    """(B, H, T, K) -> (B, T, D)."""
    H, T, K = x_BxHxTxK.shape[1:]
    return tf.reshape(tf.transpose(x_BxHxTxK, (0, 2, 1, 3)), (-1, T, H * K))


def attention(q_BxHxTxK: Any, k_BxHxTxK: Any, v_BxHxTxK: Any) -> Any:
    """Every token's mean of the values of itself and those before it (Vaswani et al. 2017), (B, H, T, K)."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(q: Any, k: Any, v: Any) -> Any:
        q, scale = _scaled(q)
        weights_BxHxTxT = _weights(q, k)
        attended = tf.matmul(weights_BxHxTxT, v)

        def gradient(dattended: Any) -> Any:
            dq, dk, dv = _gradients(q, k, v, weights_BxHxTxT, attended, dattended)
            return dq * scale, dk, dv

        return attended, gradient

    return run(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK)


def attention_with_dropout(q_BxHxTxK: Any, k_BxHxTxK: Any, v_BxHxTxK: Any, drop: Callable[[Any], Any]) -> Any:
    """The same with some weights dropped, by TensorFlow's own gradients.

    Args:
        q_BxHxTxK: queries.
        k_BxHxTxK: keys.
        v_BxHxTxK: values.
        drop: takes the weights (B, H, T, T), and returns them with some set to 0 and the others grown.
    """
    return tf.matmul(drop(_weights(_scaled(q_BxHxTxK)[0], k_BxHxTxK)), v_BxHxTxK)


def _scaled(q_BxHxTxK: Any) -> tuple[Any, float]:
    """Queries times the scale of the scores, and that.

    Scaled before the product: one that is scaled and added to becomes one operation of oneDNN, which takes
    hundreds of times as long (`_MklFusedBatchMatMulV2`, TensorFlow 2.21).
    """
    scale = q_BxHxTxK.shape[3] ** -0.5
    return q_BxHxTxK * scale, scale


def _weights(q_BxHxSxK: Any, k_BxHxTxK: Any) -> Any:
    """What the last S tokens attend to, (B, H, S, T), from scaled queries."""
    S, T = q_BxHxSxK.shape[2], k_BxHxTxK.shape[2]
    future_SxT = np.triu(np.full((S, T), MASKED, np.float32), k=T - S + 1)
    # A constant of the graph.
    future = tf.constant(future_SxT, q_BxHxSxK.dtype)
    return tf.nn.softmax(tf.matmul(q_BxHxSxK, k_BxHxTxK, transpose_b=True) + future)


def _gradients(q: Any, k: Any, v: Any, weights: Any, attended: Any, dattended: Any) -> tuple[Any, Any, Any]:
    """The gradients of the scaled queries, of the keys and of the values."""
    # Softmax's gradient needs the mean of dweights under the weights, which is the product of dattended and
    # attended, arrays T / K times smaller (Dao et al. 2022, section 3.1).
    mean = tf.reduce_sum(dattended * attended, -1, keepdims=True)
    dscores = (tf.matmul(dattended, v, transpose_b=True) - mean) * weights
    dk, dv = tf.matmul(dscores, q, transpose_a=True), tf.matmul(weights, dattended, transpose_a=True)
    return tf.matmul(dscores, k), dk, dv
