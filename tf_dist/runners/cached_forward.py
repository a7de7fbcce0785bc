"""`CachedForward` of a model that a rank has as a whole, or of which it has a part of every layer.

Legend: B rows, N new positions of a call, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common.stateless_scope import StatelessScope

from tf_dist.models.incremental import IncrementalModel, Span


class CachedSegment:
    """The compiled incremental forward pass of a model, or of consecutive layers of one.

    It is compiled once for each number of rows, of new positions and of positions that the caches hold.

    Args:
        model: of these layers.
        last: whether its output are logits, of which only the last position's are needed.
        variables: weights that are passed to each call instead of those that the model holds.

    Attributes:
        bounded: whether its caches hold a given number of positions and no more.
        traces: how often it was compiled.

    Raises:
        NotIncremental: a layer does not say how it is computed for new positions only.
    """

    def __init__(self, model: keras.Model, last: bool, variables: Sequence[Any] = ()) -> None:
        self._model, self._last, self._variables = IncrementalModel(model), last, list(variables)
        self.bounded = self._model.bounded
        self.input, self.output = model.inputs[0], model.outputs[0]
        self._compiled: dict[Any, Any] = {}
        self._structure: Any = None

    @property
    def traces(self) -> int:
        """How often it was compiled."""
        return len(self._compiled)

    def begin(self, batch: int, length: int) -> list[Any]:
        """The caches of ``batch`` rows, as a flat list of tensors."""
        caches = self._model.begin(batch, length)
        self._structure = tf.nest.map_structure(lambda _: 0, caches)
        return list(tf.nest.flatten(caches))

    def __call__(
        self, x: Any, start_B: Any, count_B: Any, state: list[Any], weights: Sequence[Any] = ()
    ) -> tuple[Any, list[Any]]:
        """The output at new positions, (B, N, ...), or logits (B, V) float32; and the caches.

        Args:
            x: token ids (B, N) or states (B, N, ...).
            start_B: see `Span`.
            count_B: see `Span`.
            state: from `begin`, or the call before.
            weights: values of ``variables``.
        """
        given = [tf.convert_to_tensor(one) for one in (x, start_B, count_B)]
        state = list(state)
        shapes = tuple((tuple(one.shape), one.dtype) for one in (*given, *state))
        if shapes not in self._compiled:
            specs = [tf.TensorSpec(*one) for one in shapes]
            specs_of_weights = [tf.TensorSpec(variable.shape, tf.float32) for variable in self._variables]
            function = tf.function(self._graph, [*specs, *specs_of_weights], autograph=False)
            self._compiled[shapes] = function.get_concrete_function()
        made = self._compiled[shapes](*given, *state, *weights)
        return made[0], list(made[1:])

    def _graph(self, *inputs: Any) -> list[Any]:
        x, start_B, count_B, *more = inputs
        places = len(more) - len(self._variables)
        caches = tf.nest.pack_sequence_as(self._structure, more[:places])
        values = list(zip(self._variables, more[places:], strict=True))
        scope = StatelessScope(state_mapping=values, initialize_variables=False)
        with scope if values else contextlib.nullcontext():
            y, caches = self._model.step(x, cache=caches, span=Span(start_B, count_B), last_only=self._last)
        y = tf.cast(y[:, 0], tf.float32) if self._last else y
        return [y, *tf.nest.flatten(caches)]


def select(state: Any, rows: np.ndarray) -> Any:
    """The tensors of a state, with the rows ``rows`` of each."""
    return tf.nest.map_structure(lambda one: tf.gather(one, rows), state)


class CachedModel:
    """`tf_dist.decoding.forward.CachedForward` of a model; a collective of the ranks that share its layers.

    Args:
        model: token ids (B, T) int32 -> logits (B, T, V), causal.
        seq_len: T.

    Raises:
        NotIncremental: a layer does not say how it is computed for new positions only.
    """

    lockstep = False

    def __init__(self, model: keras.Model, seq_len: int) -> None:
        self.segment = CachedSegment(model, last=True)
        self.limit = seq_len if self.segment.bounded else None
        self.longest = seq_len

    def begin(self, batch: int, length: int) -> list[Any]:
        """As in `CachedForward`."""
        return self.segment.begin(batch, length)

    def __call__(
        self, x_BxN: np.ndarray, start_B: np.ndarray, count_B: np.ndarray, state: list[Any]
    ) -> tuple[np.ndarray, list[Any]]:
        """As in `CachedForward`."""
        logits_BxV, state = self.segment(x_BxN, start_B, count_B, state)
        return np.asarray(logits_BxV), state

    def select(self, state: list[Any], rows: np.ndarray) -> list[Any]:
        """As in `CachedForward`."""
        return select(state, rows)  # type: ignore[no-any-return]
