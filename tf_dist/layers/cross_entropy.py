"""Vocabulary-parallel cross-entropy (Megatron-LM, Shoeybi et al. 2019).

Megatron reduces the maximum, the target's logit and the sum one after the other. Here the ranks exchange
once: each computes a local softmax, and these are merged like those of blocks (Milakov & Gimelshein 2018).

Legend: N tokens, V vocabulary, v of it on this rank, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.layers import mappings
from tf_dist.models.model_outputs import PLAIN_LOSS, LossTerms


def cross_entropy(
    comm: Comm,
    logits_Nxv: tf.Tensor,
    y_N: tf.Tensor,
    parts: Sequence[range],
    terms: LossTerms = PLAIN_LOSS,
) -> tuple[Any, Any, Any]:
    """The loss of each token, and its gradient; a collective inside a graph.

    Args:
        comm: the ranks.
        logits_Nxv: this rank's, float32.
        y_N: targets, int32, in 0 .. V - 1; for other values the result is meaningless, but not NaN.
        parts: the slices of the vocabulary of all ranks.
        terms: further terms of the loss.

    Returns:
        Losses (N,) in nats and whether the target had the highest logit (N,), the same bits on every rank;
        and the gradients of the losses for this rank's logits, (N, v).
    """
    part, V = parts[comm.rank], parts[-1].stop
    own_N = y_N - part.start
    highest_N = tf.reduce_max(logits_Nxv, -1)
    here_N = (own_N >= 0) & (own_N < len(part))
    own_logit_N = tf.gather(logits_Nxv, tf.where(here_N, own_N, 0), batch_dims=1)
    facts = [
        highest_N,
        tf.reduce_sum(tf.exp(logits_Nxv - highest_N[:, None]), -1),
        tf.where(here_N, own_logit_N, 0.0),
        tf.cast(tf.argmax(logits_Nxv, -1, tf.int32) == own_N, logits_Nxv.dtype),
    ]
    if terms.label_smoothing:
        facts.append(tf.reduce_sum(logits_Nxv, -1))
    highest_RxN, sums_RxN, targets_RxN, right_RxN, *totals_RxN = tf.unstack(
        mappings.stacked(comm, tf.stack(facts)), axis=1
    )
    top_N = tf.reduce_max(highest_RxN, 0)
    sum_N = tf.reduce_sum(sums_RxN * tf.exp(highest_RxN - top_N), 0)
    # Differences from the highest logit throughout: large logits differ by less than their rounding error.
    losses_N = tf.math.log(sum_N) + (top_N - tf.reduce_sum(targets_RxN, 0))
    # If ranks tie for the highest logit the first one has the lower token, as argmax prescribes.
    winner_N = tf.argmax(highest_RxN, 0, tf.int32)
    right_N = tf.gather(tf.transpose(right_RxN), winner_N, axis=1, batch_dims=1) > 0
    # one_hot of a token of another rank is zero.
    softmax_Nxv = tf.exp(logits_Nxv - top_N[:, None]) / sum_N[:, None]
    one_hot_Nxv = tf.one_hot(own_N, len(part))
    dlogits_Nxv = softmax_Nxv - one_hot_Nxv
    if totals_RxN:
        share = terms.label_smoothing
        losses_N += share * (tf.reduce_sum(targets_RxN, 0) - tf.reduce_sum(totals_RxN[0], 0) / V)
        dlogits_Nxv += share * (one_hot_Nxv - 1 / V)
    if terms.z_loss:
        logsum_N = tf.math.log(sum_N) + top_N
        losses_N += terms.z_loss * tf.square(logsum_N)
        dlogits_Nxv += 2 * terms.z_loss * logsum_N[:, None] * softmax_Nxv
    return losses_N, dlogits_Nxv, right_N
