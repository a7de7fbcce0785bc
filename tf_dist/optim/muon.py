"""Muon (Jordan et al. 2024): matrices step along the orthonormalised momentum, all other weights by AdamW.

An update of a matrix is U V^T of its momentum's singular value decomposition U S V^T, by five Newton-Schulz
iterations, scaled by 0.2 sqrt(larger side), so that learning rate and weight decay are AdamW's (Liu et al.
2025, "Moonlight"). Embeddings, positions, heads, vectors and tensors are no such matrices. Queries, keys and
values in one kernel are three.

Matrices are computed one by one and never by XLA: so a rank that holds some of them, or a slice of one
(`tf_dist.zero.sharded_muon`), has the bits of one that holds all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_dist.errors import UsageError
from tf_dist.models.kernel_groups import groups_of
from tf_dist.optim import elementwise
from tf_dist.optim.flat_step import FusedOptimizer
from tf_dist.optim.layer_lr import lr_scale_of
from tf_dist.parallel.sharding import part_of

# Coefficients of the quintic iteration, and of the scale.
A, B, C = 3.4445, -4.7750, 2.0315
SCALE = 0.2
# Parts of paths of what is no matrix in this sense.
NOT_MATRICES = ("embedding", "positions", "segments", "classifier", "span", "frames", "lora")


@keras.saving.register_keras_serializable("tf_dist")
class Muon(keras.optimizers.Optimizer):
    """Muon for matrices, AdamW for all other weights, with one learning rate.

    Every weight has a momentum and a velocity, matrices too, which do not use the latter.

    Args:
        learning_rate: of both.
        weight_decay: decoupled, of both.
        momentum: of matrices, Nesterov's.
        ns_steps: Newton-Schulz iterations.
        beta_1: of AdamW.
        beta_2: of AdamW.
        epsilon: of AdamW.
        name: of the optimizer.
        kwargs: as of Keras's optimizers.
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        weight_decay: float | None = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        beta_1: float = 0.9,
        beta_2: float = 0.95,
        epsilon: float = 1e-8,
        name: str = "muon",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, name=name, **kwargs)
        self.momentum, self.ns_steps = momentum, ns_steps
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def build(self, variables: Sequence[Any]) -> None:
        """Create momentum and velocity of each variable."""
        if self.built:
            return
        super().build(variables)
        self._momentums = self.add_optimizer_variables(variables, "momentum")
        self._velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """One variable's step, as `model.fit` takes it; weight decay is applied before, by Keras."""
        place = self._get_variable_index(variable)
        momentum, velocity = self._momentums[place], self._velocities[place]
        gradient = ops.cast(gradient, variable.dtype)
        rate = ops.cast(learning_rate, variable.dtype)
        known = self._trainable_variables[place]  # Keras passes TensorFlow's, which has no path
        if is_matrix(known):
            m, direction = self.direction(gradient, momentum.value)
            momentum.assign(m)
            change = orthonormal(direction, groups_of(known), self.ns_steps)
            variable.assign(variable - rate * scale_of(known) * change)
        else:
            change, m, v = self.adam(gradient, momentum.value, velocity.value)
            momentum.assign(m)
            velocity.assign(v)
            variable.assign(variable - rate * change)

    # Arithmetic of any slice of weights.

    def direction(self, gradient: Any, momentum: Any) -> tuple[Any, Any]:
        """The new momentum, and what is orthonormalised: Nesterov's."""
        momentum = self.momentum * momentum + gradient
        return momentum, gradient + self.momentum * momentum

    def adam(self, gradient: Any, momentum: Any, velocity: Any) -> tuple[Any, Any, Any]:
        """The change of weights, not yet times the learning rate; new momentum and velocity."""
        step = tf.cast(self.iterations + 1, tf.float32)
        momentum = momentum + (gradient - momentum) * (1 - self.beta_1)
        velocity = velocity + (tf.square(gradient) - velocity) * (1 - self.beta_2)
        alpha = tf.sqrt(1 - tf.pow(self.beta_2, step)) / (1 - tf.pow(self.beta_1, step))
        return momentum * alpha / (tf.sqrt(velocity) + self.epsilon), momentum, velocity

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        own = ("momentum", "ns_steps", "beta_1", "beta_2", "epsilon")
        return {**super().get_config(), **{name: getattr(self, name) for name in own}}


def is_matrix(variable: Any) -> bool:
    """Whether a weight is a matrix that Muon orthonormalises."""
    return len(variable.shape) == 2 and not any(word in variable.path for word in NOT_MATRICES)


def check_whole(variables: Sequence[Any]) -> None:
    """Refuse matrices that ranks have divided.

    Raises:
        UsageError: on every rank.
    """
    divided = [one.path for one in variables if is_matrix(one) and part_of(one).ranges is not None]
    if divided:
        raise UsageError(
            f"optimizer muon orthonormalises whole matrices, and tensor parallelism divides {divided[0]}: "
            "use a pipeline, or ZeRO, or another optimizer"
        )


def orthonormal(direction: Any, groups: int, steps: int) -> Any:
    """The update of a kernel, (M, N), that is so many matrices beside each other; not scaled."""
    parts = tf.split(direction, groups, axis=1) if groups > 1 else [direction]
    found = [newton_schulz(part, steps) for part in parts]
    return tf.concat(found, axis=1) if groups > 1 else found[0]


def scale_of(variable: Any) -> float:
    """What a matrix's update is multiplied by, with the learning rate.

    Both scalars first: TensorFlow would move a factor of the array to where it likes, and the bits with it.
    """
    rows, columns = variable.shape
    return float(SCALE * max(rows, columns // groups_of(variable)) ** 0.5)


def newton_schulz(matrix: Any, steps: int) -> Any:
    """About U V^T of a matrix, (M, N): singular values from 0.7 to 1.2 (Jordan et al. 2024)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix / (tf.norm(matrix) + 1e-7)
    x = tf.transpose(x) if tall else x
    for _ in range(steps):
        square = tf.matmul(x, x, transpose_b=True)
        x = A * x + tf.matmul(B * square + C * tf.matmul(square, square), x)
    return tf.transpose(x) if tall else x


class MuonStep(FusedOptimizer):
    """One step of Muon from a flat gradient, a variable at a time.

    Args:
        optimizer: a `Muon`, built for ``variables``.
        variables: Keras variables, in the order of the flat gradient.

    Raises:
        UsageError: on every rank: tensor parallelism has divided a matrix.
    """

    def __init__(self, optimizer: Muon, variables: Sequence[Any]) -> None:
        check_whole(variables)
        super().__init__(optimizer, variables, compiled=False)

    def _graph(self, gradient_P: tf.Tensor, scale: Any) -> None:
        optimizer = self.optimizer
        rate = tf.convert_to_tensor(optimizer.learning_rate)
        slots = elementwise.slots_of(optimizer)
        for part, variable in zip(self.parts, self.variables, strict=True):
            place = optimizer._get_variable_index(variable.value)
            momentum, velocity = slots["_momentums"][place], slots["_velocities"][place]
            gradient = tf.reshape(gradient_P[part.start : part.stop] * scale, variable.shape)
            own_rate = rate * lr_scale_of(variable)
            if is_matrix(variable):
                m, direction = optimizer.direction(gradient, momentum.value)
                change = orthonormal(direction, groups_of(variable), optimizer.ns_steps)
                own_rate *= scale_of(variable)
            else:
                change, m, v = optimizer.adam(gradient, momentum.value, velocity.value)
                velocity.assign(v)
            momentum.assign(m)
            decayed = elementwise.decays(optimizer, variable)
            variable.assign(stepped(optimizer, variable.value, change, own_rate, decayed))
        optimizer._iterations.assign_add(1)


def stepped(optimizer: Muon, weights: Any, change: Any, rate: Any, decayed: bool) -> Any:
    """New weights, of any slice: decayed first, as Keras does."""
    if decayed:
        weights = weights - weights * tf.cast(optimizer.weight_decay, weights.dtype) * rate
    return weights - rate * change
