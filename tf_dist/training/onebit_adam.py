"""Steps of 1-bit Adam: the momentum is all-reduced by the caller, the variance is frozen."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.errors import UsageError
from tf_dist.optim import elementwise
from tf_dist.optim.layer_lr import lr_scale_of
from tf_dist.runners.replica import FlatParameters, as_tensor, concat


class OneBitAdam:
    """Steps of Keras's Adam or AdamW with frozen velocities (1-bit Adam, Tang et al. 2021).

    The state stays in the optimizer's own variables, so checkpoints include it.

    Args:
        replica: this rank's; its optimizer has taken ``steps`` ordinary steps.
        steps: for the bias correction of the velocities, which is frozen as well.
    """

    def __init__(self, replica: FlatParameters, steps: int) -> None:
        replica.optimizer_step.give_back()
        self.optimizer, self.variables = replica.optimizer, replica.variables
        self.beta = float(self.optimizer.beta_1)
        self._bias = float(np.sqrt(1.0 - float(self.optimizer.beta_2) ** steps))
        places = [self.optimizer._get_variable_index(variable.value) for variable in self.variables]
        self._momentums = [self.optimizer._momentums[place] for place in places]
        self._velocities = [self.optimizer._velocities[place] for place in places]
        signature = [tf.TensorSpec((replica.parameters,), tf.float32)]
        self._step = tf.function(self._graph, signature, autograph=False)
        self._read = tf.function(lambda: concat([one.value for one in self._momentums]), input_signature=[])

    def read(self, out: np.ndarray) -> None:
        """As in `tf_dist.strategies.compressed.MomentumStep`."""
        np.copyto(out, np.asarray(self._read()))

    def apply(self, momentum: np.ndarray) -> None:
        """As in `tf_dist.strategies.compressed.MomentumStep`."""
        self._step(as_tensor(momentum))

    def _graph(self, momentum_P: tf.Tensor) -> None:
        optimizer = self.optimizer
        rate = tf.convert_to_tensor(optimizer.learning_rate)
        step = tf.cast(optimizer.iterations + 1, tf.float32)
        sizes = [int(np.prod(variable.shape, dtype=np.int64)) for variable in self.variables]
        everything = zip(
            self.variables, self._momentums, self._velocities, sizes, accumulate(sizes), strict=True
        )
        for variable, momentum, velocity, size, end in everything:
            own_rate = rate if lr_scale_of(variable) == 1 else rate * lr_scale_of(variable)
            alpha = own_rate * self._bias / (1.0 - tf.pow(self.beta, step))
            new = tf.reshape(momentum_P[end - size : end], variable.shape)
            momentum.assign(new)
            if elementwise.decays(optimizer, variable):
                variable.assign_sub(variable.value * optimizer.weight_decay * own_rate)
            variable.assign_sub(alpha * new / (tf.sqrt(velocity.value) + optimizer.epsilon))
        optimizer.iterations.assign_add(1)


def check_adam(optimizer: Any) -> None:
    """Refuse an optimizer that is not Adam.

    Raises:
        UsageError: it is another one, or uses ``amsgrad``.
    """
    kinds = (keras.optimizers.Adam, keras.optimizers.AdamW)
    if type(optimizer) not in kinds or optimizer.amsgrad:
        raise UsageError(
            f"compression onebit is for the optimizers adam and adamw without amsgrad, and this is "
            f"{type(optimizer).__name__}. Use --optimizer adamw, or another --compression"
        )
