"""The error of frames: float16 pairs in words, padding that is not a number."""

import numpy as np
import tensorflow as tf

from tf_dist.runners.frame_loss import frame_loss_and_sums


def words(values):
    return np.asarray(values, np.float16).reshape(len(values), -1).view(np.int32)


def test_mean_absolute_error_per_word():
    wanted = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    given = np.array([[[1.5, 2.0], [3.0, 1.0]]], np.float32)
    loss, sums = frame_loss_and_sums(tf.constant(given), tf.constant(words(wanted)))
    np.testing.assert_allclose(sums, [0.25 + 1.5, 2, 0])
    assert float(loss) == 1.75


def test_padding_has_neither_loss_nor_gradient():
    y = words([[[1.0, 2.0], [3.0, 4.0]]])
    y[0, 1] = -1
    outputs = tf.constant(np.zeros((1, 2, 2), np.float32))
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        loss, sums = frame_loss_and_sums(outputs, tf.constant(y))
    gradient = np.asarray(tape.gradient(loss, outputs))
    assert np.isfinite(gradient).all() and not gradient[0, 1].any() and gradient[0, 0].all()
    np.testing.assert_allclose(sums, [1.5, 1, 0])
