"""A rank's copy of the model and its optimizer, as a few compiled functions on flat arrays.

Legend: B rows of a micro-batch, T tokens, V vocabulary, P parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.models.meta_init import materialize
from tf_dist.models.model_outputs import target_len
from tf_dist.optim.fused_optimizer import optimizer_step
from tf_dist.optim.optimizers import exclude_vectors
from tf_dist.parallel.flat_buffer import ALIGNMENT_BYTES, FlatLayout, aligned_empty, norm
from tf_dist.parallel.sharding import part_of
from tf_dist.parallel.tensor_shard import TensorShard, variable_shard
from tf_dist.runners.loss import loss_and_sums
from tf_dist.runners.moving_statistics import MovingStatistics, moving_weights, refuse_synchronized
from tf_dist.runners.rng import foreign_draws, generator_states, random_states


class FlatParameters:
    """A rank's trainable variables as flat arrays, and the optimizer that updates them.

    Args:
        optimizer: any Keras optimizer.
        variables: Keras variables with their values, in the order of the full model.

    Attributes:
        variables: trainable ones, in the order of the flat gradient; layout: the slice of each.
        parameters: P.
        norm: of a gradient: this rank's, until a `Trainer` replaces it by the global norm.
        tied: weights of the model of which several ranks of a pipeline have copies; not all of them here.
    """

    tied: Sequence[Any] = ()

    def __init__(self, optimizer: keras.optimizers.Optimizer, variables: Sequence[Any]) -> None:
        self.optimizer, self.variables = optimizer, list(variables)
        self.layout = FlatLayout([variable.shape for variable in self.variables])
        self.parameters = self.layout.total
        self.norm: Callable[..., float] = norm
        self.optimizer_step = self._make_step()
        self._read = tf.function(lambda: concat(self._trainable_values()), input_signature=[])
        self._write = tf.function(self._write_graph, [tf.TensorSpec((self.parameters,), tf.float32)])

    def _make_step(self) -> Any:
        if not self.optimizer.built:
            exclude_vectors(self.optimizer)
            self.optimizer.build(self.variables)
        return optimizer_step(self.optimizer, self.variables)

    @property
    def own_shard(self) -> slice | None:
        """The elements of its flat array that this rank updates for all replicas; None: each updates all."""
        return None

    def holds(self, variable: Any) -> bool:
        """Whether this rank has a weight of the model."""
        return True

    def shards_of(self, variable: Any) -> list[TensorShard]:
        """The shards of a weight of the model on this rank; here the complete weight."""
        return [variable_shard(variable, part_of(variable))] if self.holds(variable) else []

    def complete(self, gradient: np.ndarray) -> np.ndarray:
        """Add gradients of other ranks for the same weights: none here, as all ranks sum the same ones.

        The gradient may be in shared memory: it is only read.
        """
        return gradient

    def apply(self, gradient: np.ndarray, scale: float) -> None:
        """Take one optimizer step with ``scale * gradient``, (P,) float32."""
        self.optimizer_step.apply(as_tensor(gradient), np.float32(scale))

    def skip(self) -> None:
        """Count a step that was taken elsewhere, so that learning-rate schedules advance."""
        self.optimizer.iterations.assign_add(1)

    def read_weights(self, out: np.ndarray) -> None:
        """Copy the trainable weights to ``out``, (P,) float32."""
        np.copyto(out, np.asarray(self._read()))

    def write_weights(self, weights: np.ndarray) -> None:
        """Set the trainable weights from (P,) float32; it is copied.

        Not aliased: TensorFlow's variables would keep using the caller's buffer.
        """
        self._write(tf.convert_to_tensor(weights))

    def broadcast_initial_weights(self, comm: Comm) -> None:
        """Broadcast the weights of the first replica; a collective of the replicas."""
        weights = aligned_empty(self.parameters)
        self.read_weights(weights)
        comm.broadcast(weights)
        self.write_weights(weights)

    def _write_graph(self, weights_P: tf.Tensor) -> None:
        for variable, value in zip(self.variables, self._split(weights_P), strict=True):
            variable.assign(value)

    def _split(self, flat_P: tf.Tensor) -> list[Any]:
        parts = tf.split(flat_P, self.layout.sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, self.layout.shapes, strict=True)]

    def _trainable_values(self) -> list[Any]:
        return [variable.value for variable in self.variables]


class Replica(FlatParameters):
    """Gradients, evaluation and the optimizer step of a Keras language model.

    Each function is traced once: micro-batches always have the shape (B, T).

    Args:
        model: token ids (B, T) int32 -> logits (B, T, V).
        optimizer: any Keras optimizer.
        rows: B, the rows of a micro-batch.
        seq_len: T.
        seed: of dropout and all other random operations of the model.

    Attributes:
        xla: whether XLA compiles forward and backward.
        moving: weights that the model updates itself, once `find_moving_statistics` was called.

    Raises:
        UsageError: the model holds variables that ranks could not keep equal.
    """

    def __init__(
        self, model: keras.Model, optimizer: keras.optimizers.Optimizer, rows: int, seq_len: int, seed: int
    ) -> None:
        self.model, self.seed = model, seed
        self._materialize()
        if not model.built:
            model(np.zeros((1, seq_len), np.int32))
        check_model(model)
        super().__init__(optimizer, model.trainable_variables)
        self._generators, self.moving = len(generator_states(model)), MovingStatistics()
        self.rows, self.seq_len, self.xla = rows, seq_len, False
        self.target_len = target_len(model, seq_len)
        self._compile(rows)

    def _materialize(self) -> None:
        materialize(self.model.variables)

    def use_xla(self, xla: bool) -> None:
        """Compile forward and backward with XLA, or not: equal except for rounding and dropout masks."""
        self.xla = xla

    def _compile(self, rows: int) -> None:
        x_BxT = tf.TensorSpec((rows, self.seq_len), tf.int32)
        y_BxU = tf.TensorSpec((rows, self.target_len), tf.int32)
        states = tf.TensorSpec((self._generators, 2), tf.int64)
        self.gradients_signature = [x_BxT, y_BxU, states]
        self._gradients = {
            xla: tf.function(
                self._gradients_graph,
                input_signature=self.gradients_signature,
                # Not False: that would also override `tf.config.optimizer.set_jit`.
                jit_compile=xla or None,
            )
            for xla in (False, True)
        }
        self._evaluate = tf.function(self._evaluate_graph, input_signature=[x_BxT, y_BxU])

    # Forward and backward ------------------------------------------------------------------------

    def gradients(
        self, x_BxT: np.ndarray, y_BxT: np.ndarray, draw: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The gradient of the summed loss of one micro-batch.

        Args:
            x_BxT: token ids, int32.
            y_BxT: the next token of each, -1 for padding.
            draw: (step, micro-batch): together with the seed it determines dropout.

        Returns:
            The gradient, (P,) float32, read-only; and (3,) float64: the summed loss in
            nats, the number of targets, and how many of them had the highest logit.
        """
        with self.moving_restored():
            gradient, sums = self._gradients[self.xla](x_BxT, y_BxT, self.random_states(draw))
        return np.asarray(gradient), np.asarray(sums, np.float64)

    @contextlib.contextmanager
    def moving_restored(self) -> Iterator[None]:
        """Context in which a micro-batch may update weights itself; they are restored afterwards."""
        if not self.moving:
            yield
            return
        self.moving.begin()
        try:
            yield
        finally:
            self.moving.restore_and_record()

    def find_moving_statistics(self) -> None:
        """Find the weights that the model updates itself."""
        self.moving = moving_weights(self._gradients[False].get_concrete_function(), self.model)

    def random_states(self, draw: tuple[int, int]) -> Any:
        """The states of all seed generators for a (step, micro-batch)."""
        return random_states(self.seed, draw, self._generators)

    def foreign_draws(self) -> list[str]:
        """TensorFlow's own random operations in the model, which `gradients` cannot make repeatable."""
        return foreign_draws(self._gradients[self.xla].get_concrete_function())

    def evaluate(self, x_BxT: np.ndarray, y_BxT: np.ndarray) -> np.ndarray:
        """The sums of `gradients`, without dropout and without a gradient."""
        return np.asarray(self._evaluate(x_BxT, y_BxT), np.float64)

    def _gradients_graph(self, x_BxT: tf.Tensor, y_BxT: tf.Tensor, states: Any) -> tuple[Any, Any]:
        parts, sums = self.gradients_and_sums(x_BxT, y_BxT, states)
        return concat(parts), sums

    def gradients_and_sums(self, x_BxT: tf.Tensor, y_BxT: tf.Tensor, states: Any) -> tuple[list[Any], Any]:
        """Inside a graph: the gradient of each trainable variable, dense, and the sums of `gradients`."""
        for i, variable in enumerate(generator_states(self.model)):
            variable.assign(tf.cast(states[i], variable.dtype))
        variables = [variable.value for variable in self.model.trainable_variables]
        with tf.GradientTape() as tape:
            loss, sums = loss_and_sums(self.model, x_BxT, y_BxT, training=True)
            # Losses that layers add (regularizers) count once per target.
            loss += sum(self.model.losses, 0.0) * sums[1]
        # Embedding gradients come as IndexedSlices: dense once, here.
        parts = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [tf.convert_to_tensor(part) for part in parts], sums

    def _evaluate_graph(self, x_BxT: tf.Tensor, y_BxT: tf.Tensor) -> Any:
        return loss_and_sums(self.model, x_BxT, y_BxT, training=False)[1]


def check_model(model: keras.Model) -> None:
    """Raise UsageError where a built model holds variables that ranks could not keep equal."""
    if not model.trainable_variables:
        raise UsageError(f"model {model.name!r} has no trainable variables: nothing can be learnt")
    for variable in model.trainable_variables:
        if variable.dtype != "float32":
            raise UsageError(f"variable {variable.path} is {variable.dtype}: only float32 can be trained")
    refuse_synchronized(model)


def concat(parts: list[Any]) -> Any:
    """Concatenate arrays of any shapes to one vector."""
    return tf.concat([tf.reshape(part, (-1,)) for part in parts], axis=0)


def as_tensor(array: np.ndarray) -> Any:
    """The same memory as a tensor where it is aligned: `tf.convert_to_tensor` would copy it."""
    if array.ctypes.data % ALIGNMENT_BYTES or not array.flags.writeable or not array.size:
        return tf.convert_to_tensor(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
