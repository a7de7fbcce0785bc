"""Mean absolute error of spectrogram frames, as sums.

Legend: B rows, F frames, M values of a frame (even), U = F M / 2 words of targets.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_dist.models.model_outputs import VALUES_OF_A_WORD

# The word of padding: a pair of float16 that are not numbers.
IGNORED = -1


def frame_loss_and_sums(outputs_BxFxM: tf.Tensor, y_BxU: tf.Tensor) -> tuple[Any, Any]:
    """The summed loss of frames, and (3,) float32: that, the number of targets, and 0.

    Args:
        outputs_BxFxM: predicted frames.
        y_BxU: int32 words, each a pair of float16; -1 for padding. The loss of a word is the mean of two
            absolute errors, so that the mean over words is the mean absolute error (as Tacotron 2's
            predecessor uses, Wang et al. 2017).
    """
    outputs_BxUx2 = tf.reshape(tf.cast(outputs_BxFxM, tf.float32), (*y_BxU.shape, VALUES_OF_A_WORD))
    counted_BxU = y_BxU != IGNORED
    # Padding becomes numbers before anything is computed of it: 0 * NaN is NaN, in the gradient too.
    words_BxU = tf.where(counted_BxU, y_BxU, 0)
    wanted_BxUx2 = tf.cast(tf.bitcast(words_BxU[..., None], tf.float16), tf.float32)
    wanted_BxUx2 = tf.reshape(wanted_BxUx2, (*y_BxU.shape, VALUES_OF_A_WORD))
    errors_BxU = tf.reduce_mean(tf.abs(outputs_BxUx2 - wanted_BxUx2), axis=-1)
    loss = tf.reduce_sum(tf.where(counted_BxU, errors_BxU, 0.0))
    count = tf.cast(tf.math.count_nonzero(counted_BxU), tf.float32)
    return loss, tf.stack([loss, count, tf.zeros(())])
