"""`keras.layers.LSTM`, faster on a CPU: the same numbers from fewer and larger operations.

An LSTM (Hochreiter & Schmidhuber 1997) computes, for each step t,

    z_t = x_t K + b + h_(t-1) R,     i, f, o = sigmoid(z_i, z_f, z_o),     g = tanh(z_g)
    c_t = f c_(t-1) + i g,           h_t = o tanh(c_t)

Only the product with R depends on the previous step. x K + b is one product over all steps, before the
loop, and so are, after the backward loop, the gradients of K, R and x. TensorFlow's own gradient of a loop
adds up a product of two thin matrices for every step instead.

Legend: B rows, T steps, N new ones, E width of the input, H units, G = 4 H gates' inputs in Keras's order:
i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tf_dist.errors import UsageError
from tf_dist.models.incremental import Span


@keras.saving.register_keras_serializable("tf_dist")
class LSTM(keras.layers.LSTM):
    """Equal to `keras.layers.LSTM` within rounding, in its outputs and in every gradient.

    Arguments, weights, their names, masks, states, saved files and dropout's random numbers are Keras's.
    Unsupported cases use Keras's code: other activations than tanh and sigmoid,
    ``unroll=True``, ``use_cudnn=True``, and machines with a GPU.

    (B, T, E) -> (B, H), or (B, T, H) with ``return_sequences``; with ``return_state`` also h and c, (B, H).

    Raises:
        NotImplementedError: for a second derivative. `keras.layers.LSTM` supports it.
    """

    def inner_loop(self, sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        """Run all steps; called by Keras after its preparations, such as dropout masks.

        Returns:
            The last output (B, H), all outputs (B, T, H), and the state [h, c].
        """
        if not self._is_plain():
            return super().inner_loop(sequences, initial_state, mask, training=training)
        mask_TxBx1 = _time_major_mask(mask)
        x_TxBxE = tf.transpose(sequences, (1, 0, 2))
        if self.go_backwards:
            x_TxBxE = tf.reverse(x_TxBxE, [0])
            mask_TxBx1 = None if mask_TxBx1 is None else tf.reverse(mask_TxBx1, [0])
        # The state is a sum over all steps: in a short dtype it would stop growing when a step is small.
        dtype = x_TxBxE.dtype if x_TxBxE.dtype.size >= tf.float32.size else tf.float32
        h_TxBxH, h_BxH, c_BxH = self._all_steps(
            tf.cast(self._input_projection(x_TxBxE, training), dtype),
            self._weight("recurrent_kernel"),
            [tf.cast(state_BxH, dtype) for state_BxH in initial_state],
            mask_TxBx1,
            training,
        )
        h_TxBxH, h_BxH, c_BxH = (tf.cast(a, self.compute_dtype) for a in (h_TxBxH, h_BxH, c_BxH))
        return *self._outputs(h_TxBxH, h_BxH, mask_TxBx1), [h_BxH, c_BxH]

    # Incremental (`tf_dist.models.incremental`): the state is kept, in the type in which it is added up.
    bounded = False

    @property
    def steps(self) -> bool:
        """Whether `step` knows these options."""
        plain = self.return_sequences and not (self.go_backwards or self.return_state or self.stateful)
        return self._is_plain() and plain

    def begin(self, batch: int, length: int) -> list[Any]:
        """Return the initial state, h and c, of ``batch`` rows, for any number of positions."""
        return [tf.zeros((batch, units), self._state_dtype) for units in self._state_units()]

    def step(self, x_BxNxE: Any, *, cache: list[Any], span: Span) -> tuple[Any, list[Any]]:
        """Return the outputs of new positions, (B, N, H), and the state after the last one of each row."""
        x_NxBxE = tf.transpose(tf.cast(x_BxNxE, self.compute_dtype), (1, 0, 2))
        mask_NxBx1 = tf.range(x_BxNxE.shape[1])[:, None, None] < span.count_B[:, None]
        z_NxBxG = tf.cast(self._input_projection(x_NxBxE, False), self._state_dtype)
        h_NxBxH, state = self._kept_steps(z_NxBxG, cache, mask_NxBx1)
        return tf.cast(tf.transpose(h_NxBxH, (1, 0, 2)), self.compute_dtype), state

    @property
    def _state_dtype(self) -> Any:
        dtype = tf.as_dtype(self.compute_dtype)
        return dtype if dtype.size >= tf.float32.size else tf.float32

    def _state_units(self) -> list[int]:
        """The units of h and c that are kept: with tensor parallelism c is that of the rank's own."""
        return [self.units, self.units]

    def _kept_steps(
        self, z_NxBxG: tf.Tensor, state: list[Any], mask_NxBx1: tf.Tensor
    ) -> tuple[Any, list[Any]]:
        """The states h of new steps, and h and c after them."""
        kernel_HxG = tf.convert_to_tensor(self.cell.recurrent_kernel)
        h_NxBxH, h_BxH, c_BxH = recurrence(z_NxBxG, kernel_HxG, state, mask_NxBx1, Products)
        return h_NxBxH, [h_BxH, c_BxH]

    def _all_steps(
        self,
        z_TxBxG: tf.Tensor,
        kernel_HxG: tf.Tensor,
        state: list[Any],
        mask_TxBx1: tf.Tensor,
        training: bool,
    ) -> tuple[Any, Any, Any]:
        """The states h of all steps (T, B, H), and the last h and c; see `recurrence`."""
        if not (training and 0 < self.recurrent_dropout < 1):
            return recurrence(z_TxBxG, kernel_HxG, state, mask_TxBx1, Products)
        masks_BxH = [tf.cast(m, state[0].dtype) for m in self.cell.get_recurrent_dropout_mask(state[0])]
        return recurrence(z_TxBxG, kernel_HxG, state, mask_TxBx1, lambda w: _DroppedProducts(w, masks_BxH))

    def _is_plain(self) -> bool:
        return (
            keras.backend.backend() == "tensorflow"
            and self.activation is keras.activations.tanh
            and self.recurrent_activation is keras.activations.sigmoid
            and not self.unroll
            and self.use_cudnn is not True
            and not tf.config.list_logical_devices("GPU")
        )

    def _input_projection(self, x_TxBxE: tf.Tensor, training: bool) -> Any:
        """The sums x K + b of all steps, (T, B, G)."""
        kernel_ExG = self._weight("kernel")
        mask = self.cell.get_dropout_mask(x_TxBxE[0]) if training and 0 < self.dropout < 1 else None
        if isinstance(mask, list):  # one per gate
            gates = zip(mask, tf.split(kernel_ExG, 4, axis=1), strict=True)
            z_TxBxG = tf.concat([_product(x_TxBxE * m_BxE, k_ExH) for m_BxE, k_ExH in gates], axis=2)
        else:
            z_TxBxG = _product(x_TxBxE if mask is None else x_TxBxE * mask, kernel_ExG)
        return z_TxBxG + tf.convert_to_tensor(self.cell.bias) if self.use_bias else z_TxBxG

    def adapt(self, name: str, a: Any, b: Any, scale: float) -> None:
        """Add ``scale * A B`` to a kernel of the cell, in every step (`tf_dist.models.lora`).

        Args:
            name: ``kernel`` or ``recurrent_kernel``.
            a: (E, r) or (H, r).
            b: (r, G).
            scale: of the product.

        Raises:
            UsageError: Keras's code would run this layer, and not see the adapter.
        """
        if not self._is_plain():
            raise UsageError(
                f"layer {self.name!r} cannot have an adapter: on a CPU, with the activations tanh and "
                "sigmoid, without unroll and use_cudnn it can. Leave it out of --lora-targets"
            )

        def added() -> Any:
            return scale * self._adapter_product(tf.convert_to_tensor(a), tf.convert_to_tensor(b))

        # A function: of a variable Keras would think that it is another weight of this layer.
        setattr(self, f"_{name}_adapter", added)

    def _weight(self, name: str) -> Any:
        """A kernel of the cell, with its adapter if it has one."""
        kernel = tf.convert_to_tensor(getattr(self.cell, name))
        added = getattr(self, f"_{name}_adapter", None)
        return kernel if added is None else kernel + added()

    def _adapter_product(self, a_Exr: tf.Tensor, b_rxG: tf.Tensor) -> Any:
        return tf.matmul(a_Exr, b_rxG)

    def _outputs(self, h_TxBxH: tf.Tensor, h_BxH: tf.Tensor, mask_TxBx1: tf.Tensor) -> tuple[Any, Any]:
        """Keras's outputs from the states h: masked steps repeat the previous output, or are zero."""
        shown_TxBx1 = mask_TxBx1
        if mask_TxBx1 is not None and not self.zero_output_for_mask:
            # Before its first step a row has no output to repeat: zero, for any initial state.
            shown_TxBx1 = tf.cumsum(tf.cast(mask_TxBx1, tf.int32)) > 0
        if not self.return_sequences:
            last_BxH = h_BxH if shown_TxBx1 is None else _zero_unless(shown_TxBx1[-1], h_BxH)
            return last_BxH, last_BxH[:, None]
        if shown_TxBx1 is not None:
            h_TxBxH = _zero_unless(shown_TxBx1, h_TxBxH)
        return h_TxBxH[-1], tf.transpose(h_TxBxH, (1, 0, 2))


def _time_major_mask(mask: Any) -> Any:
    """Keras's mask (B, T), or a list that begins with it, as (T, B, 1) booleans; or None."""
    mask_BxT = mask[0] if isinstance(mask, list | tuple) else mask
    if mask_BxT is None:
        return None
    return tf.transpose(tf.cast(mask_BxT, tf.bool))[:, :, None]


def _zero_unless(condition: Any, x: Any) -> Any:
    return tf.where(condition, x, tf.zeros((), x.dtype))


def _product(x_TxBxN: tf.Tensor, w_NxM: tf.Tensor) -> Any:
    """One matrix product for all steps and rows: (T, B, M)."""
    shape = tf.shape(x_TxBxN)
    z = tf.matmul(tf.reshape(x_TxBxN, (-1, w_NxM.shape[0])), w_NxM)
    z = tf.reshape(z, (shape[0], shape[1], w_NxM.shape[1]))
    return tf.ensure_shape(z, (*x_TxBxN.shape[:2], w_NxM.shape[1]))


def recurrence(
    z_TxBxG: tf.Tensor,
    kernel_HxG: tf.Tensor,
    state: list[Any],
    mask_TxBx1: tf.Tensor,
    products: Callable[[Any], Products],
) -> tuple[Any, Any, Any]:
    """The states h of all steps, (T, B, H), and the last h and c, with a custom gradient.

    Args:
        z_TxBxG: x K + b.
        kernel_HxG: R.
        state: initial h and c, (B, H).
        mask_TxBx1: steps to take; the others leave the state unchanged. Or None.
        products: creates the `Products` of R.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(z_TxBxG: tf.Tensor, kernel_HxG: tf.Tensor, h_BxH: tf.Tensor, c_BxH: tf.Tensor) -> Any:
        product = products(kernel_HxG)
        h_TxBxH, last_h_BxH, last_c_BxH, saved = _forward(z_TxBxG, product, h_BxH, c_BxH, mask_TxBx1)
        h_TxBxH = product.whole(h_TxBxH)

        def backward(dh_TxBxH: tf.Tensor, dlast_h_BxH: tf.Tensor, dlast_c_BxH: tf.Tensor, *_: Any) -> Any:
            upstream = product.own(dh_TxBxH), dlast_h_BxH, dlast_c_BxH
            dz_TxBxG, dh_BxH, dc_BxH = _backward(*upstream, product, mask_TxBx1, saved)
            # Two products, so that h is not copied to prepend the initial state.
            dkernel_HxG = product.kernel_gradient(product.whole(h_BxH)[None], dz_TxBxG[:1])
            dkernel_HxG += product.kernel_gradient(h_TxBxH[:-1], dz_TxBxG[1:])
            return dz_TxBxG, dkernel_HxG, dh_BxH, dc_BxH

        def gradient(*upstream: Any) -> Any:
            return _once(backward)(*upstream, z_TxBxG, kernel_HxG, h_BxH, c_BxH)

        return (h_TxBxH, last_h_BxH, last_c_BxH), gradient

    h_TxBxH, h_BxH, c_BxH = run(z_TxBxG, kernel_HxG, *state)
    return h_TxBxH, h_BxH, c_BxH


def _once(function: Callable[..., Any]) -> Any:
    """The function, but differentiating its results with respect to any of its arguments raises.

    Values saved by the forward pass are constants to TensorFlow: a second derivative would silently be wrong.
    Hence the arguments that the function itself does not need.
    """

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            "tf_dist.models.fast_lstm.LSTM has no second derivative: use keras.layers.LSTM, which has the "
            "same weights"
        )

    return tf.custom_gradient(lambda *inputs: (function(*inputs), refuse))


class Products:
    """The products with R: of h in a step, of dz in a backward step, and R's gradient over all steps.

    Tensor-parallel ranks (`tf_dist.layers.lstm`) have their own columns of R, and in the loops their own
    units of h; `whole` and `own` convert between these and all units.
    """

    def __init__(self, kernel_HxG: tf.Tensor) -> None:
        self.kernel_HxG = kernel_HxG

    def whole(self, h: Any) -> Any:
        """Return all units of h, (..., H)."""
        return h

    def own(self, dh: Any) -> Any:
        """Return the units that the loops have on this rank."""
        return dh

    def forward(self, h_BxH: tf.Tensor) -> Any:
        """The product h R, (B, G)."""
        return self.product(self.whole(h_BxH), self.kernel_HxG)

    @staticmethod
    def product(x: Any, w: Any) -> Any:
        """A product in the kernel's dtype, from and to the state's."""
        return tf.cast(tf.matmul(tf.cast(x, w.dtype), w), x.dtype)

    def backward(self) -> Callable[[Any], Any]:
        """The function from dz, (B, G), to dz R^T, (B, H)."""
        # Transposed once: with few rows, a product that transposes R itself runs at half the speed.
        kernel_GxH = tf.transpose(self.kernel_HxG)
        return lambda dz_BxG: self.product(dz_BxG, kernel_GxH)

    def kernel_gradient(self, h_TxBxH: tf.Tensor, dz_TxBxG: tf.Tensor) -> Any:
        """The product h^T dz, summed over steps and rows: (H, G)."""
        return self.outer(h_TxBxH, dz_TxBxG)

    def outer(self, x_TxBxN: tf.Tensor, y_TxBxM: tf.Tensor) -> Any:
        """The sum of x^T y over all steps and rows, (N, M), as one product in the kernel's type."""
        x, y = (tf.cast(tf.reshape(a, (-1, a.shape[2])), self.kernel_HxG.dtype) for a in (x_TxBxN, y_TxBxM))
        return tf.matmul(x, y, transpose_a=True)


class _DroppedProducts(Products):
    """Products with recurrent dropout, in which each gate has its own masked h.

    One mask per gate, the same in all steps (Gal & Ghahramani 2016).
    """

    def __init__(self, kernel_HxG: tf.Tensor, masks_BxH: list[Any]) -> None:
        super().__init__(kernel_HxG)
        self.masks_BxH = masks_BxH
        self.kernels_HxH = tf.split(kernel_HxG, 4, axis=1)

    def forward(self, h_BxH: tf.Tensor) -> Any:
        gates = zip(self.masks_BxH, self.kernels_HxH, strict=True)
        return tf.concat([self.product(h_BxH * mask, kernel) for mask, kernel in gates], axis=1)

    def backward(self) -> Callable[[Any], Any]:
        transposed_HxH = [tf.transpose(kernel) for kernel in self.kernels_HxH]

        def product(dz_BxG: tf.Tensor) -> Any:
            gates = zip(tf.split(dz_BxG, 4, axis=1), transposed_HxH, self.masks_BxH, strict=True)
            return sum(self.product(dz_BxH, kernel) * mask for dz_BxH, kernel, mask in gates)

        return product

    def kernel_gradient(self, h_TxBxH: tf.Tensor, dz_TxBxG: tf.Tensor) -> Any:
        gates = zip(tf.split(dz_TxBxG, 4, axis=2), self.masks_BxH, strict=True)
        return tf.concat([self.outer(h_TxBxH * mask, dz_TxBxH) for dz_TxBxH, mask in gates], axis=1)


def _forward(
    z_TxBxG: tf.Tensor, product: Products, h_BxH: tf.Tensor, c_BxH: tf.Tensor, mask_TxBx1: tf.Tensor
) -> tuple[Any, ...]:
    """All steps: the states h (T, B, H), the last h and c, and the values saved for the backward pass."""
    T = z_TxBxG.shape[0] or tf.shape(z_TxBxG)[0]

    def step(t: Any, h_BxH: tf.Tensor, c_BxH: tf.Tensor, arrays: Any) -> Any:
        i, f, g, o = tf.split(z_TxBxG[t] + product.forward(h_BxH), 4, axis=1)
        i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
        new_c_BxH = f * c_BxH + i * g
        tanh_c = tf.tanh(new_c_BxH)
        new_h_BxH = o * tanh_c
        if mask_TxBx1 is not None:
            new_c_BxH = tf.where(mask_TxBx1[t], new_c_BxH, c_BxH)
            new_h_BxH = tf.where(mask_TxBx1[t], new_h_BxH, h_BxH)
        values = (new_h_BxH, i, f, g, o, tanh_c, c_BxH)
        arrays = [array.write(t, value) for array, value in zip(arrays, values, strict=True)]
        return t + 1, new_h_BxH, new_c_BxH, arrays

    arrays = [_array(T, h_BxH.shape, h_BxH.dtype) for _ in range(7)]
    _, h_BxH, c_BxH, arrays = _loop(T, step, (0, h_BxH, c_BxH, arrays))
    return arrays[0].stack(), h_BxH, c_BxH, arrays[1:]


def _backward(
    dh_TxBxH: tf.Tensor,
    dh_BxH: tf.Tensor,
    dc_BxH: tf.Tensor,
    product: Products,
    mask_TxBx1: tf.Tensor,
    saved: list[Any],
) -> tuple[Any, Any, Any]:
    """All steps from the last to the first.

    Args:
        dh_TxBxH: the gradient of every h, from its uses outside.
        dh_BxH: that of the last h, as a state.
        dc_BxH: that of the last c.
        product: the products with R.
        mask_TxBx1: see `recurrence`.
        saved: from `_forward`.

    Returns:
        The gradients of z (T, B, G), and of the initial h and c.
    """
    T = dh_TxBxH.shape[0] or tf.shape(dh_TxBxH)[0]
    product_with_dz = product.backward()
    dsigmoid, dtanh = tf.raw_ops.SigmoidGrad, tf.raw_ops.TanhGrad

    def step(t: Any, dh_BxH: tf.Tensor, dc_BxH: tf.Tensor, dz_array: Any) -> Any:
        t = t - 1
        i, f, g, o, tanh_c, c_BxH = (array.read(t) for array in saved)
        dh_BxH = dh_BxH + dh_TxBxH[t]
        through_c = dc_BxH + dtanh(y=tanh_c, dy=dh_BxH * o)
        dz_BxG = tf.concat(
            [
                dsigmoid(y=i, dy=through_c * g),
                dsigmoid(y=f, dy=through_c * c_BxH),
                dtanh(y=g, dy=through_c * i),
                dsigmoid(y=o, dy=dh_BxH * tanh_c),
            ],
            axis=1,
        )
        before_c = through_c * f
        if mask_TxBx1 is None:
            return t, product_with_dz(dz_BxG), before_c, dz_array.write(t, dz_BxG)
        # A masked step passes h and c through.
        dz_BxG = _zero_unless(mask_TxBx1[t], dz_BxG)
        before_c = tf.where(mask_TxBx1[t], before_c, dc_BxH)
        before_h = product_with_dz(dz_BxG) + _zero_unless(~mask_TxBx1[t], dh_BxH)
        return t, before_h, before_c, dz_array.write(t, dz_BxG)

    start = (T, dh_BxH, dc_BxH, _array(T, (dh_BxH.shape[0], 4 * dh_BxH.shape[1]), dh_BxH.dtype))
    _, dh_BxH, dc_BxH, dz_array = _loop(T, step, start)
    return dz_array.stack(), dh_BxH, dc_BxH


def _array(T: Any, shape: Any, dtype: Any) -> Any:
    """A tensor array for one tensor per step."""
    return tf.TensorArray(dtype, size=T, element_shape=shape, clear_after_read=False)


def _loop(T: Any, step: Callable[..., Any], start: tuple[Any, ...]) -> Any:
    """Call ``step`` T times; with a static bound, as XLA requires, and no other condition."""
    return tf.while_loop(lambda *_: True, step, start, maximum_iterations=T)
