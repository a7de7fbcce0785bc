"""Weights that a model changes itself while it trains, as the averages of BatchNormalization.

Every micro-batch finds them as they were when the step began. What the micro-batches of a step have made of
them is summed over ranks as `tf_dist.parallel.totals.Totals` sums losses: a row for each, which one rank
fills, so that the sum is exact; the mean of the rows is what they are after the step. So the moving mean is
that of all ranks' batches, moves once a step, and has the same bits on any number of ranks. The statistics
with which a micro-batch is normalized are its own: that is so for any number of ranks, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.errors import UsageError
from tf_dist.training.randomness import generator_states

WAYS_OUT = (
    "Use LayerNormalization or GroupNormalization, set layer.trainable = False, or choose strategy "
    "allreduce, master, or zero with zero_stage 1, and no ranks that share the model"
)


class Moving:
    """The weights of a model that its own training function changes.

    Args:
        variables: Keras variables.
    """

    def __init__(self, variables: Iterable[Any] = ()) -> None:
        self.variables = list(variables)
        self._start: list[np.ndarray] = []
        self._last: list[np.ndarray] = []
        self._rows: dict[int, list[np.ndarray]] = {}

    def __bool__(self) -> bool:
        return bool(self.variables)

    def begin(self) -> None:
        """Remember what they are, before a micro-batch changes them."""
        self._start = [np.array(np.asarray(v.value)) for v in self.variables]

    def take_back(self) -> None:
        """Let them be as before, and remember what the micro-batch has made of them."""
        self._last = [np.array(np.asarray(v.value)) for v in self.variables]
        for variable, value in zip(self.variables, self._start, strict=True):
            variable.assign(value)

    def begin_step(self) -> None:
        """Forget the micro-batches of a step that was not finished."""
        self._rows.clear()

    def note(self, micro_batch: int) -> None:
        """What was taken back last was made by this micro-batch of the step."""
        if self:
            self._rows[micro_batch] = self._last

    def reduce(self, comm: Comm, micro_batches: int) -> list[np.ndarray]:
        """What they are after the step, the mean over its micro-batches, on every rank; a collective."""
        if not self:
            return []
        found = []
        for place, variable in enumerate(self.variables):
            rows = np.zeros((micro_batches, *variable.shape))
            for number, values in self._rows.items():
                rows[number] = values[place]
            comm.allreduce(rows.reshape(-1))
            found.append(rows.mean(axis=0))
        return found

    def move(self, values: list[np.ndarray]) -> None:
        """Let them be these values, which `reduce` has found."""
        for variable, value in zip(self.variables, values, strict=False):
            variable.assign(value.astype(np.asarray(variable.value).dtype))


def moving_weights(function: Any, model: keras.Model) -> Moving:
    """The weights that a traced training function changes.

    Args:
        function: concrete; forward and backward of the model.
        model: whose weights they are.

    Raises:
        UsageError: it changes a variable that is not among them, so that ranks could not keep it equal.
    """
    drawn = {id(_handle(v)) for v in generator_states(model)}
    changed = {id(handle) for handle in _changed(function)} - drawn
    known = {id(_handle(v)): v for v in model.weights if v._value is not None}
    strange = [v for v in function.variables if id(v.handle) in changed - set(known)]
    if strange:
        raise UsageError(
            f"training changes the variable {strange[0].name!r}, which is no weight of the model: each rank "
            "would have its own. Make it in the layer's build(): self.add_weight(..., trainable=False)"
        )
    return Moving(v for number, v in known.items() if number in changed)


def refuse_synchronized(model: keras.Model) -> None:
    """Refuse layers that want statistics of more rows than those of a micro-batch.

    Raises:
        UsageError: with a way out.
    """
    for layer in model._flatten_layers():
        if getattr(layer, "synchronized", False) is True and layer.trainable:
            raise UsageError(
                f"layer {layer.name!r} is to be synchronized: a Trainer takes the statistics of each "
                "micro-batch, so that results do not depend on the number of ranks. Leave out "
                "synchronized=True, and choose micro_batch_size as large as the statistics need"
            )


def refuse_moving(model: keras.Model, why: str) -> None:
    """Refuse layers of Keras that change weights of their own, where micro-batches do not meet.

    Raises:
        UsageError: with a way out.
    """
    kinds = (keras.layers.BatchNormalization, keras.layers.SpectralNormalization)
    for layer in model._flatten_layers():
        if isinstance(layer, kinds) and layer.trainable:
            kind = type(layer).__name__
            raise UsageError(
                f"layer {layer.name!r} is {kind}, which changes weights of its own: each rank would keep "
                f"its own averages, because {why}. {WAYS_OUT}"
            )


def _handle(variable: Any) -> Any:
    return variable.value.handle


def _changed(function: Any) -> Iterator[Any]:
    """The resources that operations of a graph assign to, or may assign to inside of a function."""
    graph = function.graph
    outside = {id(inner): tensor for tensor, inner in graph.captures}
    inner_assigns = any(
        _assigns(node.op) for one in graph.as_graph_def().library.function for node in one.node_def
    )
    for operation in graph.get_operations():
        calls = any(attribute.func.name for attribute in operation.node_def.attr.values())
        if _assigns(operation.type):
            yield from (outside[id(operation.inputs[0])],) if id(operation.inputs[0]) in outside else ()
        elif calls and inner_assigns:
            yield from (outside[id(one)] for one in operation.inputs if id(one) in outside)


def _assigns(kind: str) -> bool:
    return "Assign" in kind or kind.startswith("ResourceScatter")
