"""Moving statistics: weights that a model updates itself in training, such as BatchNormalization's averages.

Every micro-batch starts from their values at the beginning of the step. The values after each micro-batch are
reduced over ranks as `tf_dist.parallel.totals.Totals` reduces losses: a row for each, which one rank fills,
so that the sum is exact; the mean of the rows is the value after the step. So the moving mean is that of all
ranks' batches, is updated once a step, and has the same bits on any number of ranks. A micro-batch is
normalized with its own statistics, also for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.runners.rng import generator_states

WAYS_OUT = (
    "Use LayerNormalization or GroupNormalization, set layer.trainable = False, or choose strategy "
    "allreduce, master, or zero with zero_stage 1, and no ranks that share the model"
)


class MovingStatistics:
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
        """Save their values, before a micro-batch changes them."""
        self._start = [np.array(np.asarray(v.value)) for v in self.variables]

    def restore_and_record(self) -> None:
        """Restore the saved values, and record those that the micro-batch has left."""
        self._last = [np.array(np.asarray(v.value)) for v in self.variables]
        for variable, value in zip(self.variables, self._start, strict=True):
            variable.assign(value)

    def begin_step(self) -> None:
        """Discard micro-batches of an unfinished step."""
        self._rows.clear()

    def note(self, micro_batch: int) -> None:
        """Assign the values recorded last to this micro-batch of the step."""
        if self:
            self._rows[micro_batch] = self._last

    def reduce(self, comm: Comm, micro_batches: int) -> list[np.ndarray]:
        """The values after the step, the mean over its micro-batches, on every rank; a collective."""
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
        """Set them to the values from `reduce`."""
        for variable, value in zip(self.variables, values, strict=False):
            variable.assign(value.astype(np.asarray(variable.value).dtype))


def moving_weights(function: Any, model: keras.Model) -> MovingStatistics:
    """Find the weights that a traced training function changes.

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
    return MovingStatistics(v for number, v in known.items() if number in changed)


def refuse_synchronized(model: keras.Model) -> None:
    """Refuse layers that need statistics of more rows than those of a micro-batch.

    Raises:
        UsageError: with an alternative.
    """
    for layer in model._flatten_layers():
        if getattr(layer, "synchronized", False) is True and layer.trainable:
            raise UsageError(
                f"layer {layer.name!r} is to be synchronized: a Trainer takes the statistics of each "
                "micro-batch, so that results do not depend on the number of ranks. Leave out "
                "synchronized=True, and choose micro_batch_size as large as the statistics need"
            )


def refuse_moving(model: keras.Model, why: str) -> None:
    """Refuse Keras layers that update weights of their own, where micro-batches are not synchronized.

    Raises:
        UsageError: with an alternative.
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
