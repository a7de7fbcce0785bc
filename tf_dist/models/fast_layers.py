"""Keras's norms and GELU with custom gradients: the same numbers in fewer passes over memory.

Between the matrix products of a Transformer only the number of memory accesses matters.
TensorFlow's own gradients make a pass for every operation of the forward pass, and often two.

Legend: N rows, all axes but the last; D width.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("tf_dist")
class LayerNormalization(keras.layers.LayerNormalization):
    """`keras.layers.LayerNormalization` over the last axis (Ba et al. 2016), equal within rounding.

    Weights, names and files are Keras's. Other axes, and a norm without gain, use Keras's code.
    Computed in float32 for any compute dtype, like Keras.
    """

    positionwise = True

    def call(self, inputs: Any) -> Any:
        """Return the normalized inputs, (..., D)."""
        x = tf.convert_to_tensor(inputs)
        if self.axis not in ([-1], [len(x.shape) - 1]) or self.gamma is None:
            return super().call(inputs)
        gain_D = tf.convert_to_tensor(self.gamma)
        offset_D = tf.zeros_like(gain_D) if self.beta is None else tf.convert_to_tensor(self.beta)
        y_NxD = _layer_norm(tf.reshape(x, (-1, x.shape[-1])), gain_D, offset_D, self.epsilon)
        return tf.ensure_shape(tf.reshape(y_NxD, tf.shape(x)), x.shape)


def _layer_norm(x_NxD: tf.Tensor, gain_D: tf.Tensor, offset_D: tf.Tensor, epsilon: float) -> Any:
    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x_NxD: tf.Tensor, gain_D: tf.Tensor, offset_D: tf.Tensor) -> Any:
        dtype = x_NxD.dtype
        x_NxD = tf.cast(x_NxD, tf.float32)
        centred_NxD = x_NxD - tf.reduce_mean(x_NxD, -1, keepdims=True)
        inverse_Nx1 = tf.math.rsqrt(tf.reduce_mean(tf.square(centred_NxD), -1, keepdims=True) + epsilon)
        normed_NxD = centred_NxD * inverse_Nx1

        def gradient(dy_NxD: tf.Tensor) -> Any:
            dy_NxD = tf.cast(dy_NxD, tf.float32)
            # The two means over a row are products with the gain: no temporary array of dy times gain.
            weights_Dx1 = gain_D[:, None] / gain_D.shape[0]
            product_NxD = dy_NxD * normed_NxD
            mean_Nx1, slope_Nx1 = tf.matmul(dy_NxD, weights_Dx1), tf.matmul(product_NxD, weights_Dx1)
            dx_NxD = (dy_NxD * gain_D - mean_Nx1 - normed_NxD * slope_Nx1) * inverse_Nx1
            return tf.cast(dx_NxD, dtype), tf.reduce_sum(product_NxD, 0), tf.reduce_sum(dy_NxD, 0)

        return tf.cast(normed_NxD * gain_D + offset_D, dtype), gradient

    return run(x_NxD, gain_D, offset_D)


@keras.saving.register_keras_serializable("tf_dist")
class RMSNormalization(keras.layers.RMSNormalization):
    """`keras.layers.RMSNormalization` over the last axis (Zhang & Sennrich 2019), equal within rounding.

    Weights, names and files are Keras's. Computed in float32 for any compute dtype, like Keras.
    """

    positionwise = True

    def call(self, inputs: Any) -> Any:
        """Return the normalized inputs, (..., D)."""
        x = tf.convert_to_tensor(inputs)
        if self.axis not in (-1, [-1], len(x.shape) - 1):
            return super().call(inputs)
        return rms_norm(x, tf.convert_to_tensor(self.scale), self.epsilon)


def rms_norm(x: tf.Tensor, gain_D: tf.Tensor, epsilon: float) -> Any:
    """Each vector of the last axis over the root of its mean square, times the gain; as ``x``."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: tf.Tensor, gain_D: tf.Tensor) -> Any:
        dtype, gain_dtype = x.dtype, gain_D.dtype
        x, gain_D = tf.cast(x, tf.float32), tf.cast(gain_D, tf.float32)
        inverse = tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + epsilon)
        normed = x * inverse

        def gradient(dy: tf.Tensor) -> Any:
            dy = tf.cast(dy, tf.float32)
            product = dy * normed
            slope = tf.tensordot(product, gain_D[:, None] / gain_D.shape[0], 1)
            dx = (dy * gain_D - normed * slope) * inverse
            dgain = tf.reduce_sum(tf.reshape(product, (-1, gain_D.shape[0])), 0)
            return tf.cast(dx, dtype), tf.cast(dgain, gain_dtype)

        return tf.cast(normed * gain_D, dtype), gradient

    return run(x, gain_D)


@keras.saving.register_keras_serializable("tf_dist")  # type: ignore[untyped-decorator]
def gelu_tanh(x: Any) -> Any:
    """GPT-2's GELU, with the normal distribution approximated by a hyperbolic tangent."""
    return tf.nn.gelu(tf.convert_to_tensor(x), approximate=True)


@keras.saving.register_keras_serializable("tf_dist")
class Gated(keras.layers.Layer):
    """A gated linear unit's product (Shazeer 2020): activation(gate) * value, (..., F).

    Args:
        activation: ``swiglu`` or ``geglu``.
    """

    positionwise = True

    def __init__(self, activation: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.activation = activation

    def call(self, gate: Any, value: Any) -> Any:
        """Return the product."""
        gate = tf.convert_to_tensor(gate)
        return (tf.nn.silu(gate) if self.activation == "swiglu" else gelu(gate)) * value

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "activation": self.activation}


@keras.saving.register_keras_serializable("tf_dist")  # type: ignore[untyped-decorator]
def gelu(x: Any) -> Any:
    """Keras's "gelu": x times the standard normal's distribution function at x (Hendrycks & Gimpel 2016).

    Keras and TensorFlow call erfc, which takes three times as long as erf here; in bfloat16 neither is a
    vector operation, so that both are computed in float32.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any) -> Any:
        scaled = tf.cast(x, tf.float32) * math.sqrt(0.5)
        below = tf.math.erf(scaled) * 0.5 + 0.5

        def gradient(dy: Any) -> Any:
            density = tf.exp(-tf.square(scaled)) * (scaled * math.pi**-0.5)  # x times the normal density
            return tf.cast(tf.cast(dy, tf.float32) * (below + density), x.dtype)

        return tf.cast(tf.cast(x, tf.float32) * below, x.dtype), gradient

    return run(tf.convert_to_tensor(x))
