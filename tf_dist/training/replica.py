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

from tf_dist.comm.base import Comm
from tf_dist.errors import UsageError
from tf_dist.models.outline import materialize
from tf_dist.parallel.flat import ALIGNMENT_BYTES, FlatLayout, aligned_empty, norm
from tf_dist.parallel.parts import part_of
from tf_dist.training.loss import loss_and_sums
from tf_dist.training.moving import Moving, moving_weights, refuse_synchronized
from tf_dist.training.optimizer_step import optimizer_step
from tf_dist.training.optimizers import spare_vectors
from tf_dist.training.pieces import Piece, variable_piece
from tf_dist.training.randomness import foreign_draws, generator_states, random_states


class Weights:
    """What a rank trains of a model, as flat arrays, and the optimizer that changes it.

    Args:
        optimizer: any Keras optimizer.
        variables: Keras variables with their values, in the order of the whole model.

    Attributes:
        variables: what it trains, in the order of the flat gradient; layout: where each lies in it.
        parameters: P.
        norm: of a gradient: of this rank's, until a `Trainer` knows that others have more of it.
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
            spare_vectors(self.optimizer)
            self.optimizer.build(self.variables)
        return optimizer_step(self.optimizer, self.variables)

    @property
    def own_shard(self) -> slice | None:
        """The elements of its flat array that this rank steps for all replicas; None: each steps all."""
        return None

    def holds(self, variable: Any) -> bool:
        """Whether this rank has a weight of the model."""
        return True

    def pieces_of(self, variable: Any) -> list[Piece]:
        """What this rank holds of a weight of the model."""
        return [variable_piece(variable, part_of(variable))] if self.holds(variable) else []

    def complete(self, gradient: np.ndarray) -> np.ndarray:
        """Add what other ranks have for the same weights: nothing, for all ranks have summed the same ones.

        The gradient may lie in memory that ranks share: it is only read.
        """
        return gradient

    def apply(self, gradient: np.ndarray, scale: float) -> None:
        """Take one optimizer step with ``scale * gradient``, (P,) float32."""
        self.optimizer_step.apply(as_tensor(gradient), np.float32(scale))

    def skip(self) -> None:
        """Count a step that was taken elsewhere, so that learning-rate schedules go on."""
        self.optimizer.iterations.assign_add(1)

    def read_weights(self, out: np.ndarray) -> None:
        """Copy the trainable weights to ``out``, (P,) float32."""
        np.copyto(out, np.asarray(self._read()))

    def write_weights(self, weights: np.ndarray) -> None:
        """Set the trainable weights from (P,) float32; it is copied.

        Not aliased: TensorFlow's variables would keep living in the caller's buffer.
        """
        self._write(tf.convert_to_tensor(weights))

    def give_weights(self, comm: Comm) -> None:
        """Give all replicas the weights of the first one; a collective of theirs."""
        weights = aligned_empty(self.parameters)
        self.read_weights(weights)
        comm.broadcast(weights)
        self.write_weights(weights)

    def _write_graph(self, weights_P: Any) -> None:
        for variable, value in zip(self.variables, self._split(weights_P), strict=True):
            variable.assign(value)

    def _split(self, flat_P: Any) -> list[Any]:
        parts = tf.split(flat_P, self.layout.sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, self.layout.shapes, strict=True)]

    def _trainable_values(self) -> list[Any]:
        return [variable.value for variable in self.variables]


class Replica(Weights):
    """Gradients, evaluation and the optimizer step of a Keras language model.

    Each function is traced once: micro-batches always have the shape (B, T).

    Args:
        model: token ids (B, T) int32 -> logits (B, T, V).
        optimizer: any Keras optimizer.
        rows: B, the rows of a micro-batch.
        seq_len: T.
        seed: of dropout and everything else that is random in the model.

    Attributes:
        xla: whether XLA compiles forward and backward.
        moving: weights that the model changes itself, once `find_moving` was called.

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
        self._generators, self.moving = len(generator_states(model)), Moving()
        self.rows, self.seq_len, self.xla = rows, seq_len, False
        self._compile(rows, seq_len)

    def _materialize(self) -> None:
        materialize(self.model.variables)

    def use_xla(self, xla: bool) -> None:
        """Let XLA compile forward and backward, or not: the same but for rounding and what dropout drops."""
        self.xla = xla

    def _compile(self, rows: int, seq_len: int) -> None:
        batch_BxT = tf.TensorSpec((rows, seq_len), tf.int32)
        states = tf.TensorSpec((self._generators, 2), tf.int64)
        self.gradients_signature = [batch_BxT, batch_BxT, states]
        self._gradients = {
            xla: tf.function(
                self._gradients_graph,
                input_signature=self.gradients_signature,
                # Not False: that would also forbid what `tf.config.optimizer.set_jit` asks for.
                jit_compile=xla or None,
            )
            for xla in (False, True)
        }
        self._evaluate = tf.function(self._evaluate_graph, input_signature=[batch_BxT, batch_BxT])

    # Forward and backward ------------------------------------------------------------------------

    def gradients(
        self, x_BxT: np.ndarray, y_BxT: np.ndarray, draw: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The gradient of the summed loss of one micro-batch.

        Args:
            x_BxT: token ids, int32.
            y_BxT: the next token of each, -1 where there is none.
            draw: (step, micro-batch): with the seed, all that dropout depends on.

        Returns:
            The gradient, (P,) float32, which must only be read; and (3,) float64: the summed loss in
            nats, the number of targets, and how many of them had the highest logit.
        """
        with self.unmoved():
            gradient, sums = self._gradients[self.xla](x_BxT, y_BxT, self.random_states(draw))
        return np.asarray(gradient), np.asarray(sums, np.float64)

    @contextlib.contextmanager
    def unmoved(self) -> Iterator[None]:
        """Inside, a micro-batch may change weights by itself; afterwards they are as before."""
        if not self.moving:
            yield
            return
        self.moving.begin()
        try:
            yield
        finally:
            self.moving.take_back()

    def find_moving(self) -> None:
        """Find out which weights the model changes itself."""
        self.moving = moving_weights(self._gradients[False].get_concrete_function(), self.model)

    def random_states(self, draw: tuple[int, int]) -> Any:
        """The states of all seed generators for a (step, micro-batch)."""
        return random_states(self.seed, draw, self._generators)

    def foreign_draws(self) -> list[str]:
        """TensorFlow's random operations in the model that `gradients` cannot make repeatable."""
        return foreign_draws(self._gradients[self.xla].get_concrete_function())

    def evaluate(self, x_BxT: np.ndarray, y_BxT: np.ndarray) -> np.ndarray:
        """The sums of `gradients`, without dropout and without a gradient."""
        return np.asarray(self._evaluate(x_BxT, y_BxT), np.float64)

    def _gradients_graph(self, x_BxT: Any, y_BxT: Any, states: Any) -> tuple[Any, Any]:
        parts, sums = self.gradients_and_sums(x_BxT, y_BxT, states)
        return concat(parts), sums

    def gradients_and_sums(self, x_BxT: Any, y_BxT: Any, states: Any) -> tuple[list[Any], Any]:
        """Inside a graph: the gradient of each trainable variable, dense, and the sums of `gradients`."""
        for i, variable in enumerate(generator_states(self.model)):
            variable.assign(tf.cast(states[i], variable.dtype))
        variables = [variable.value for variable in self.model.trainable_variables]
        with tf.GradientTape() as tape:
            loss, sums = loss_and_sums(self.model, x_BxT, y_BxT, training=True)
            # Losses that layers add (regularizers) count once for every target.
            loss += sum(self.model.losses, 0.0) * sums[1]
        # Embedding gradients come as IndexedSlices: dense once, here.
        parts = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [tf.convert_to_tensor(part) for part in parts], sums

    def _evaluate_graph(self, x_BxT: Any, y_BxT: Any) -> Any:
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
    """Arrays of any shapes as one vector."""
    return tf.concat([tf.reshape(part, (-1,)) for part in parts], axis=0)


def as_tensor(array: np.ndarray) -> Any:
    """The same memory as a tensor where it is aligned: `tf.convert_to_tensor` would copy it."""
    if array.ctypes.data % ALIGNMENT_BYTES or not array.flags.writeable or not array.size:
        return tf.convert_to_tensor(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
