"""Loss and counts: cross-entropy, with the logits in one array or in chunks; or the error of frames.

Legend: B rows, T tokens, D width, V vocabulary, N = B T, C chunks, S tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from tf_dist.layers import VocabularyParallelEmbedding, mappings
from tf_dist.layers.cross_entropy import cross_entropy as divided_cross_entropy
from tf_dist.models.lm_head import LanguageModelHead, head_of
from tf_dist.models.model_outputs import (
    FRAMES,
    PLAIN_LOSS,
    LossTerms,
    class_weights_of,
    loss_terms_of,
    outputs_of,
)
from tf_dist.runners.frame_loss import frame_loss_and_sums

# Target of padding: no loss, not counted.
IGNORED = -1
# From this many logits on (128 MiB), the loss of a model with a known head is computed in chunks.
CHUNKED_FROM = 1 << 25
# Logits of a chunk, at most (64 MiB). Shorter chunks save no memory, as the gradient of the table needs some
# as well, and take time: each adds to all of it (docs/decisions/0013-head-in-chunks.md has the figures).
CHUNK = 1 << 24


def loss_and_sums(model: keras.Model, x_BxT: tf.Tensor, y_BxT: tf.Tensor, training: bool) -> tuple[Any, Any]:
    """The summed loss in nats, and (3,) float32: that, the number of targets, how many had the highest logit.

    Args:
        model: rows (B, W) int32, as token ids (B, T) -> logits (B, T, V), or what it declares
            (`tf_dist.models.model_outputs`). Of a segment: its inputs.
        x_BxT: token ids, int32.
        y_BxT: the class of each output, as the next token; -1 for padding.
        training: whether dropout is active, and the loss is differentiated.
    """
    if outputs_of(model) == FRAMES:
        return frame_loss_and_sums(model(x_BxT, training=training), y_BxT)
    terms = loss_terms_of(model) if training else PLAIN_LOSS
    head = head_of(model)
    if head is not None and isinstance(head.embedding, VocabularyParallelEmbedding):
        return _from_shared_head(head, head.embedding, x_BxT, y_BxT, training, terms)
    if head is None or y_BxT.shape.num_elements() * head.vocab_size < CHUNKED_FROM:
        weights = class_weights_of(model) if training else ()
        return _from_logits(model(x_BxT, training=training), y_BxT, weights, terms)
    with_terms = partial(_cross_entropy, terms=terms)
    return _from_states(head.trunk(x_BxT, training=training), head.table(), y_BxT, training, with_terms)


def _from_logits(
    logits_BxTxV: tf.Tensor,
    y_BxT: tf.Tensor,
    weights_V: Sequence[float] = (),
    terms: LossTerms = PLAIN_LOSS,
) -> tuple[Any, Any]:
    logits_BxTxV = tf.cast(logits_BxTxV, tf.float32)
    counted_BxT = y_BxT != IGNORED
    correct = _count(tf.equal(tf.argmax(logits_BxTxV, axis=-1, output_type=tf.int32), y_BxT))
    # If the logits have no other reader, TensorFlow overwrites them with their gradient.
    with tf.control_dependencies([correct]):
        losses_BxT = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(y_BxT, 0), logits_BxTxV)
    if any(terms):
        losses_BxT += _more_terms(logits_BxTxV, y_BxT, terms)
    if weights_V:
        losses_BxT *= tf.gather(tf.constant(weights_V, tf.float32), tf.maximum(y_BxT, 0))
    # where() and not a product: a padding row may hold anything, and 0 * inf is NaN.
    loss = tf.reduce_sum(tf.where(counted_BxT, losses_BxT, 0.0))
    return loss, tf.stack([loss, _count(counted_BxT), correct])


def _more_terms(logits: tf.Tensor, y: tf.Tensor, terms: LossTerms) -> Any:
    """What is added to the cross-entropy of each target, of the shape of ``y``.

    With smoothing s the target is (1 - s) one-hot + s / V: the loss changes by s (logit of y - mean logit).
    """
    target = tf.gather(logits, tf.maximum(y, 0), axis=-1, batch_dims=len(y.shape))
    added = terms.label_smoothing * (target - tf.reduce_mean(logits, -1))
    if terms.z_loss:
        added += terms.z_loss * tf.square(tf.reduce_logsumexp(logits, -1))
    return added


def _from_shared_head(
    head: LanguageModelHead,
    embedding: VocabularyParallelEmbedding,
    x_BxT: tf.Tensor,
    y_BxT: tf.Tensor,
    training: bool,
    terms: LossTerms,
) -> tuple[Any, Any]:
    """The loss with a partitioned vocabulary: no rank ever has the logits of all of it."""
    comm, parts = embedding.comm, embedding.parts
    states_BxTxD = mappings.copied(comm, head.trunk(x_BxT, training=training))
    share = partial(divided_cross_entropy, comm, parts=parts, terms=terms)
    return _from_states(states_BxTxD, head.table(), y_BxT, training, share, max(map(len, parts)))


def _from_states(
    states_BxTxD: tf.Tensor,
    table_VxD: tf.Tensor,
    y_BxT: tf.Tensor,
    training: bool,
    cross_entropy: Callable[[Any, Any], tuple[Any, Any, Any]] | None = None,
    widest: int = 0,
) -> tuple[Any, Any]:
    """The loss from the factors of the logits, a chunk of tokens at a time.

    The loss is a sum, so its gradient is known up to a factor while a chunk's logits exist: it is
    computed at once, and nothing is recomputed (as in Liger Kernel, Hsu et al. 2024). Chunks are of
    tokens: chunks of the vocabulary would have to be recomputed once the softmax's sum is known.

    Args:
        states_BxTxD: see `LanguageModelHead`.
        table_VxD: all of the vocabulary, or this rank's shard.
        y_BxT: targets.
        training: whether there will be a gradient.
        cross_entropy: logits and targets to losses, their gradients, and which logits are the highest.
        widest: logits of a token on the rank that has most: all ranks must make the same chunks. 0: V.
    """
    y_N = tf.reshape(y_BxT, (-1,))
    counted_N = y_N != IGNORED
    # As in `_from_logits`: no value of a padding row may reach a sum.
    states_NxD = tf.where(counted_N[:, None], tf.reshape(states_BxTxD, (-1, states_BxTxD.shape[2])), 0)

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(states_NxD: tf.Tensor, table_VxD: tf.Tensor) -> Any:
        C = -(-y_N.shape[0] * (widest or table_VxD.shape[0]) // CHUNK)
        made = _chunk_by_chunk(states_NxD, table_VxD, y_N, training, C, cross_entropy or _cross_entropy)
        sums, dstates_NxD, dtable_VxD = made

        def gradient(dloss: Any, *_: Any) -> Any:
            assert training, "this loss was asked for without a gradient"
            return tf.cast(dstates_NxD * dloss, states_NxD.dtype), dtable_VxD * dloss

        return (sums[0], sums[1]), gradient

    loss, correct = run(states_NxD, table_VxD)
    return loss, tf.stack([loss, _count(counted_N), correct])


def _cross_entropy(
    logits_SxV: tf.Tensor, y_S: tf.Tensor, terms: LossTerms = PLAIN_LOSS
) -> tuple[Any, Any, Any]:
    """Losses, their gradients for the logits, and which targets have the highest logit."""
    right_S = tf.equal(tf.argmax(logits_SxV, axis=-1, output_type=tf.int32), y_S)
    with tf.control_dependencies([right_S]):
        losses_S, dlogits_SxV = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(
            features=logits_SxV, labels=tf.maximum(y_S, 0)
        )
    if any(terms):
        with tf.GradientTape() as tape:
            tape.watch(logits_SxV)
            added_S = _more_terms(logits_SxV, y_S, terms)
        return losses_S + added_S, dlogits_SxV + tape.gradient(added_S, logits_SxV), right_S
    return losses_S, dlogits_SxV, right_S


def _chunk_by_chunk(
    states_NxD: tf.Tensor,
    table_VxD: tf.Tensor,
    y_N: tf.Tensor,
    training: bool,
    C: int,
    cross_entropy: Callable[[Any, Any], tuple[Any, Any, Any]],
) -> tuple[Any, Any, Any]:
    """The sums, [loss, correct]; and the gradients of states and table (float32), or zeros."""
    (N, D), V = states_NxD.shape, table_VxD.shape[0]
    S = -(-N // C)
    states_CxSxD = tf.reshape(tf.pad(states_NxD, ((0, C * S - N), (0, 0))), (C, S, D))
    y_CxS = tf.reshape(tf.pad(y_N, ((0, C * S - N),), constant_values=IGNORED), (C, S))
    short_VxD = tf.cast(table_VxD, states_NxD.dtype)  # the type that the model computes in

    def step(c: Any, sums: Any, dtable_VxD: tf.Tensor, dstates: Any) -> Any:
        states_SxD, y_S = states_CxSxD[c], y_CxS[c]
        logits_SxV = tf.cast(tf.matmul(states_SxD, short_VxD, transpose_b=True), tf.float32)
        losses_S, dlogits_SxV, right_S = cross_entropy(logits_SxV, y_S)
        counted_S = tf.cast(y_S != IGNORED, tf.float32)
        sums += tf.stack([tf.reduce_sum(losses_S * counted_S), _count(right_S)])
        if training:
            dlogits_SxV = tf.cast(dlogits_SxV * counted_S[:, None], short_VxD.dtype)
            dstates = dstates.write(c, tf.cast(tf.matmul(dlogits_SxV, short_VxD), tf.float32))
            dtable_VxD += tf.cast(tf.matmul(dlogits_SxV, states_SxD, transpose_a=True), tf.float32)
        return c + 1, sums, dtable_VxD, dstates

    room = tf.TensorArray(tf.float32, size=C, element_shape=(S, D))
    start = (0, tf.zeros(2), tf.zeros((V, D) if training else ()), room)
    more = {"maximum_iterations": C, "parallel_iterations": 1}
    _, sums, dtable_VxD, dstates = tf.while_loop(lambda *_: True, step, start, **more)
    return sums, tf.reshape(dstates.stack(), (-1, D))[:N] if training else 0.0, dtable_VxD


def _count(flags: Any) -> Any:
    return tf.cast(tf.math.count_nonzero(flags), tf.float32)
