"""Cross-entropy of logits whose vocabulary is divided among ranks (Megatron-LM, Shoeybi et al. 2019).

Megatron reduces the maximum, the target's logit and the sum one after the other. Here the ranks exchange
once: each takes its softmax alone, and these are merged as those of blocks are (Milakov & Gimelshein 2018).

Legend: N tokens, V vocabulary, v of it on this rank, R ranks.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_dist.comm.base import Comm
from tf_dist.layers import collectives


def cross_entropy(comm: Comm, logits_Nxv: Any, y_N: Any, part: range) -> tuple[Any, Any, Any]:
    """The loss of each token, and what its gradient takes; a collective inside a graph.

    Args:
        comm: the ranks.
        logits_Nxv: this rank's, float32.
        y_N: targets, int32, among all of V; what is no token has no meaning, and no NaN.
        part: this rank's tokens.

    Returns:
        Losses (N,) in nats and whether the target had the highest logit (N,), the same bits on every rank;
        and the gradients of the losses for this rank's logits, (N, v).
    """
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
    highest_RxN, sums_RxN, targets_RxN, right_RxN = tf.unstack(
        collectives.stacked(comm, tf.stack(facts)), axis=1
    )
    top_N = tf.reduce_max(highest_RxN, 0)
    sum_N = tf.reduce_sum(sums_RxN * tf.exp(highest_RxN - top_N), 0)
    # Differences from the highest logit throughout: large logits differ by less than they are rounded to.
    losses_N = tf.math.log(sum_N) + (top_N - tf.reduce_sum(targets_RxN, 0))
    # Where ranks share the highest logit the first one has the lower token, as argmax has it.
    winner_N = tf.argmax(highest_RxN, 0, tf.int32)
    right_N = tf.gather(tf.transpose(right_RxN), winner_N, axis=1, batch_dims=1) > 0
    # one_hot of what is not here is zero.
    dlogits_Nxv = tf.exp(logits_Nxv - top_N[:, None]) / sum_N[:, None] - tf.one_hot(own_N, len(part))
    return losses_N, dlogits_Nxv, right_N
