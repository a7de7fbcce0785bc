"""Attention with custom gradients: causal, in one block or blockwise; or masked by a bias, in one block.

A sliding window of W tokens (Child et al. 2019; Jiang et al. 2023) hides those that are W and more before a
query.

Legend: B rows, T tokens, D width, H heads, K width of a head, S tokens of a block, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

# Added to masked scores. Not -inf: every row has a token to attend to, and 0 x inf would give NaN.
MASKED = -1e9
# Queries per block. 128 and 512 take as long within a tenth, the latter with twice the memory.
BLOCK = 256
# From this many tokens on, attention is blockwise. One row, 6 heads of 64, forward and backward on one Zen 4
# core, in one block and blockwise: 15 and 14 ms for 512 tokens (in bfloat16 9 and 10), 60 and 45 for 1024,
# 244 and 169 for 2048.
BLOCKWISE_FROM = 1024


def split_heads(qkv_BxTx3D: tf.Tensor, heads: int, parts: int = 3) -> list[Any]:
    """Queries, keys and values, (B, H, T, K) each, from one projection; or so many ``parts`` of them.

    One transpose each way. TensorFlow's gradient of slicing is as large as the sliced array, mostly zero, and
    slow: three of them, and two sums, took a quarter of a small GPT's step.
    """
    T, K = qkv_BxTx3D.shape[1], qkv_BxTx3D.shape[2] // (parts * heads)

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(qkv_BxTx3D: tf.Tensor) -> Any:
        separate = tf.reshape(qkv_BxTx3D, (-1, T, parts, heads, K))
        parts_3xBxHxTxK = tf.transpose(separate, (2, 0, 3, 1, 4))

        def gradient(*dparts_BxHxTxK: tf.Tensor) -> Any:
            dparts = tf.transpose(tf.stack(dparts_BxHxTxK), (1, 3, 0, 2, 4))
            return tf.reshape(dparts, (-1, T, parts * heads * K))

        return tf.unstack(parts_3xBxHxTxK), gradient

    return list(run(qkv_BxTx3D))


def join_heads(x_BxHxTxK: tf.Tensor) -> Any:
    """(B, H, T, K) -> (B, T, D)."""
    H, T, K = x_BxHxTxK.shape[1:]
    return tf.reshape(tf.transpose(x_BxHxTxK, (0, 2, 1, 3)), (-1, T, H * K))


def repeat_heads(x_BxGxTxK: tf.Tensor, heads: int) -> Any:
    """Keys or values of G heads for H queries each of which H / G in a row share (Ainslie et al. 2023)."""
    times = heads // x_BxGxTxK.shape[1]
    return x_BxGxTxK if times == 1 else tf.repeat(x_BxGxTxK, times, axis=1)


def attention(q_BxHxTxK: tf.Tensor, k_BxHxTxK: tf.Tensor, v_BxHxTxK: tf.Tensor, window: int = 0) -> Any:
    """Causal attention (Vaswani et al. 2017), (B, H, T, K).

    From `BLOCKWISE_FROM` tokens on it is computed blockwise. T must be known when the graph is traced.
    ``window``: W; 0: none.
    """
    if q_BxHxTxK.shape[2] >= BLOCKWISE_FROM:
        return blockwise_attention(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, window=window)
    return plain_attention(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, window)


def older(queries: np.ndarray, keys: np.ndarray, window: int) -> np.ndarray | None:
    """What hides keys from queries by their positions, (Q, T) float32; None: every key is in the window."""
    if not window or queries.max(initial=0) - keys.min(initial=0) < window:
        return None
    return np.where(queries[:, None] - keys >= window, np.float32(MASKED), np.float32(0))


def plain_attention(q_BxHxTxK: tf.Tensor, k_BxHxTxK: tf.Tensor, v_BxHxTxK: tf.Tensor, window: int = 0) -> Any:
    """Attention in one block: its weights, (B, H, T, T), are saved for the backward pass."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(q: Any, k: Any, v: Any) -> Any:
        q, scale = _scaled(q)
        weights_BxHxTxT = _weights(q, k, window)
        attended = tf.matmul(weights_BxHxTxT, v)

        def gradient(dattended: Any) -> Any:
            dq, dk, dv = _gradients(q, k, v, weights_BxHxTxT, attended, dattended)
            return dq * scale, dk, dv

        return attended, gradient

    return run(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK)


def biased_attention(
    q_BxHxQxK: tf.Tensor, k_BxHxTxK: tf.Tensor, v_BxHxTxK: tf.Tensor, bias: tf.Tensor
) -> Any:
    """Attention that a bias of its scores masks, (B, H, Q, K), in one block; not causal by itself.

    Args:
        q_BxHxQxK: queries.
        k_BxHxTxK: keys.
        v_BxHxTxK: values.
        bias: added to the scores: 0 or `MASKED`, of a shape that broadcasts to (B, H, Q, T); no gradient.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(q: Any, k: Any, v: Any) -> Any:
        q, scale = _scaled(q)
        weights_BxHxQxT = _biased_weights(q, k, bias)
        attended = tf.matmul(weights_BxHxQxT, v)

        def gradient(dattended: Any) -> Any:
            dq, dk, dv = _gradients(q, k, v, weights_BxHxQxT, attended, dattended)
            return dq * scale, dk, dv

        return attended, gradient

    return run(q_BxHxQxK, k_BxHxTxK, v_BxHxTxK)


def _biased_weights(q_BxHxQxK: tf.Tensor, k_BxHxTxK: tf.Tensor, bias: tf.Tensor) -> Any:
    scores = tf.matmul(q_BxHxQxK, k_BxHxTxK, transpose_b=True)
    return tf.nn.softmax(scores + tf.cast(bias, scores.dtype))


def blockwise_attention(
    q_BxHxTxK: tf.Tensor, k_BxHxTxK: tf.Tensor, v_BxHxTxK: tf.Tensor, block: int = BLOCK, window: int = 0
) -> Any:
    """Attention in blocks of S = ``block`` queries, with memory that grows with S T instead of T T.

    Only keys up to a block's last query are multiplied: half of all, for long sequences. Nothing is saved for
    the backward pass, which recomputes the weights of each block (Rabe & Staats 2021; Dao et al. 2022). A
    block has all its keys at once, so that its softmax is the plain one.
    """
    T = q_BxHxTxK.shape[2]
    places = [(start, min(start + block, T)) for start in range(0, T, block)]

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(q: Any, k: Any, v: Any) -> Any:
        q, scale = _scaled(q)
        attended: Any = []
        for start, end in places:
            with tf.control_dependencies(attended[-1:]):  # one block at a time: they share memory
                weights = _weights(q[:, :, start:end], k[:, :, :end], window)
                attended.append(tf.matmul(weights, v[:, :, :end]))
        attended = tf.concat(attended, axis=2)

        def gradient(dattended: Any) -> Any:
            dq, dk, dv = _blockwise_gradients(places, q, k, v, attended, dattended, window)
            return dq * scale, dk, dv

        return attended, gradient

    return run(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK)


def _blockwise_gradients(
    places: list[tuple[int, int]], q: Any, k: Any, v: Any, attended: Any, dattended: Any, window: int
) -> tuple[Any, Any, Any]:
    """`_gradients` of each block, from the last one, which has all keys, to the first."""
    dqs: list[Any] = []
    # No earlier block attends to keys and values after this one: their gradients are complete.
    dk, dv, complete = None, None, []
    for start, end in reversed(places):
        with tf.control_dependencies(dqs[-1:] if dk is None else [dqs[-1], dk, dv]):
            parts = (q[:, :, start:end], k[:, :, :end], v[:, :, :end])
            done, ddone = attended[:, :, start:end], dattended[:, :, start:end]
            weights = _weights(*parts[:2], window)
            dq, more_dk, more_dv = _gradients(*parts, weights, done, ddone)
            dqs.append(dq)
            dk, dv = (more_dk, more_dv) if dk is None else (dk + more_dk, dv + more_dv)
            complete.append((dk[:, :, start:], dv[:, :, start:]))
            dk, dv = dk[:, :, :start], dv[:, :, :start]
    dks, dvs = zip(*reversed(complete), strict=True)
    return tf.concat(dqs[::-1], axis=2), tf.concat(dks, axis=2), tf.concat(dvs, axis=2)


def attention_with_dropout(
    q_BxHxTxK: tf.Tensor,
    k_BxHxTxK: tf.Tensor,
    v_BxHxTxK: tf.Tensor,
    drop: Callable[[Any], Any],
    bias: tf.Tensor | None = None,
    window: int = 0,
) -> Any:
    """Attention with dropout of weights, by TensorFlow's own gradients, in one block.

    Args:
        q_BxHxTxK: queries.
        k_BxHxTxK: keys.
        v_BxHxTxK: values.
        drop: maps the weights (B, H, T, T) to weights with some set to 0 and the others scaled up.
        bias: as in `biased_attention`; None: causal.
        window: W of causal attention; 0: none.
    """
    q, k = _scaled(q_BxHxTxK)[0], k_BxHxTxK
    weights = _weights(q, k, window) if bias is None else _biased_weights(q, k, bias)
    return tf.matmul(drop(weights), v_BxHxTxK)


def _scaled(q_BxHxTxK: tf.Tensor) -> tuple[Any, float]:
    """Scaled queries, and the scale.

    Scaled before the product: a product followed by a scale and an addition becomes one operation of oneDNN,
    which takes hundreds of times as long (`_MklFusedBatchMatMulV2`, TensorFlow 2.21).
    """
    scale = q_BxHxTxK.shape[3] ** -0.5
    return q_BxHxTxK * scale, scale


def _weights(q_BxHxSxK: tf.Tensor, k_BxHxTxK: tf.Tensor, window: int = 0) -> Any:
    """Attention weights of the last S of T tokens, (B, H, S, T), from scaled queries."""
    S, T = q_BxHxSxK.shape[2], k_BxHxTxK.shape[2]
    hidden_SxT = older(np.arange(T - S, T), np.arange(T), window)
    if hidden_SxT is not None:
        hidden_SxT[:, T - S :] += np.triu(np.full((S, S), MASKED, np.float32), k=1)
        scores = tf.matmul(q_BxHxSxK, k_BxHxTxK, transpose_b=True)
        return tf.nn.softmax(scores + tf.constant(hidden_SxT, scores.dtype))
    # A constant of the graph, the same for all blocks: the causal mask among the queries of a block.
    future_SxS = tf.constant(np.triu(np.full((S, S), MASKED, np.float32), k=1), q_BxHxSxK.dtype)
    scores = tf.matmul(q_BxHxSxK, k_BxHxTxK[:, :, T - S :], transpose_b=True) + future_SxS
    if T > S:
        scores = tf.concat(
            [tf.matmul(q_BxHxSxK, k_BxHxTxK[:, :, : T - S], transpose_b=True), scores], axis=-1
        )
    return tf.nn.softmax(scores)


def _gradients(q: Any, k: Any, v: Any, weights: Any, attended: Any, dattended: Any) -> tuple[Any, Any, Any]:
    """The gradients of the scaled queries, of the keys and of the values."""
    # Softmax's gradient needs the mean of dweights under the weights, which is the product of dattended and
    # attended, arrays T / K times smaller (Dao et al. 2022, section 3.1).
    mean = tf.reduce_sum(dattended * attended, -1, keepdims=True)
    dscores = (tf.matmul(dattended, v, transpose_b=True) - mean) * weights
    dk, dv = tf.matmul(dscores, q, transpose_a=True), tf.matmul(weights, dattended, transpose_a=True)
    return tf.matmul(dscores, k), dk, dv
