"""Split a traced graph into steps that run one after the other, with the activations between them saved.

So the forward pass of a stage can run now and its backward pass later, and a backward pass in two halves,
without a hand-written list of the activations they need: the graph knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import tensorflow as tf

Values = dict[str, Any]
# Stateful to TensorFlow, but not ordered with other reads.
UNORDERED = frozenset({"ReadVariableOp", "VarHandleOp", "Placeholder", "ResourceGather"})


class GraphCuts:
    """Steps of a graph.

    Operations that depend on no input (reading a weight, casting it) are recomputed in each step that needs
    them: they are no activations to save. Operations with side effects (messages to other ranks) stay in
    trace order.

    Args:
        traced: from `tf.compat.v1.wrap_function`.
        inputs: for each step, its placeholders.
        fetches: for each step, its result tensors.
    """

    def __init__(
        self, traced: Any, inputs: Sequence[Sequence[Any]], fetches: Sequence[Sequence[Any]]
    ) -> None:
        self._inputs = [[tensor.name for tensor in given] for given in inputs]
        given = {name for names in self._inputs for name in names}
        made_at = _steps_of(fetches, _bound(traced.graph, given), given)
        needed = [_needed(number, fetches[number], made_at, given) for number in range(len(fetches))]
        self._needed = [list(tensors) for tensors in needed]
        tensors = {name: tensor for one in needed for name, tensor in one.items()}
        # Of the tensors available after this step, those needed by later steps.
        self._later = [set[str]() for _ in fetches]
        for number in reversed(range(len(fetches) - 1)):
            wanted_later = self._later[number + 1] | set(self._needed[number + 1])
            given_later = {name for names in self._inputs[number + 1 :] for name in names}
            self._later[number] = {
                name
                for name in wanted_later - given_later
                if name in given or made_at[tensors[name].op] <= number
            }
        self._kept: list[list[str]] = []
        self._functions: list[Callable[..., list[Any]]] = []
        for number, wanted in enumerate(fetches):
            made = sorted(name for name in self._later[number] if made_at.get(tensors[name].op) == number)
            self._kept.append(made)
            results = [*wanted, *(tensors[name] for name in made)]
            mine = {op for op, at in made_at.items() if at == number}
            self._functions.append(_part(traced.graph, mine, list(needed[number].values()), results))

    def run(self, number: int, given: Sequence[Any], kept: Values) -> tuple[list[Any], Values]:
        """Run one step.

        Args:
            number: of the step.
            given: values of its own inputs.
            kept: from the step before.

        Returns:
            Its results; and the tensors that later steps need.
        """
        known = {**kept, **dict(zip(self._inputs[number], given, strict=True))}
        made = self._functions[number](*(known[name] for name in self._needed[number]))
        results = len(made) - len(self._kept[number])
        known.update(zip(self._kept[number], made[results:], strict=True))
        return list(made[:results]), {name: known[name] for name in self._later[number]}


def bytes_of(values: Values) -> int:
    """Memory of saved values; also of the tensor lists of a loop."""
    return sum(_bytes(value) for value in values.values())


def _bytes(value: Any) -> int:
    if value.dtype != tf.variant:
        return int(value.dtype.size * prod(value.shape))
    data = value._handle_data
    if not (data and data.is_set and data.shape_and_type):
        return 0
    element = data.shape_and_type[0]
    size = prod(dim.size for dim in element.shape.dim)
    length = int(tf.raw_ops.TensorListLength(input_handle=value))
    return length * int(size) * int(tf.as_dtype(element.dtype).size)


def _bound(graph: Any, inputs: set[str]) -> set[Any]:
    """The operations that depend on an input."""
    bound: set[Any] = set()
    for op in graph.get_operations():
        own = any(tensor.name in inputs for tensor in op.outputs)
        if own or any(tensor.op in bound for tensor in op.inputs):
            bound.add(op)
    return bound


def _steps_of(fetches: Sequence[Sequence[Any]], bound: set[Any], given: set[str]) -> dict[Any, int]:
    """The first step in which each operation's results are needed."""
    made_at: dict[Any, int] = {}
    for number, wanted in enumerate(fetches):
        todo = list(wanted)
        while todo:
            tensor = todo.pop()
            if tensor.op in bound and tensor.op not in made_at and tensor.name not in given:
                made_at[tensor.op] = number
                todo += tensor.op.inputs
    return made_at


def _needed(number: int, wanted: Sequence[Any], made_at: dict[Any, int], given: set[str]) -> dict[str, Any]:
    """The tensors that a step takes from earlier ones, or from its inputs."""
    used = [tensor for op, at in made_at.items() if at == number for tensor in op.inputs]
    return {
        tensor.name: tensor
        for tensor in [*used, *wanted]
        if tensor.name in given or made_at.get(tensor.op, number) < number
    }


def _part(graph: Any, mine: set[Any], feeds: list[Any], results: list[Any]) -> Callable[..., list[Any]]:
    """A function from ``feeds`` to ``results`` that runs the operations ``mine``, and those without inputs.

    Built from the graph's definition instead of TensorFlow's ``prune``, which includes operations that only
    precede its feeds, and fails when it is fed some outputs of an operation that has several.
    """
    fed = {tensor.name for tensor in feeds}
    external = {inside.name: outside for outside, inside in graph.captures}
    ops, todo = set(mine), [tensor for op in mine for tensor in op.inputs] + results
    while todo:
        tensor = todo.pop()
        if tensor.name not in fed and tensor.name not in external and tensor.op not in ops:
            ops.add(tensor.op)
            todo += tensor.op.inputs
    description = _describe(graph, ops)
    captured = {tensor.name for op in ops for tensor in op.inputs} & set(external)
    captured |= {tensor.name for tensor in results} & set(external)

    def run(*values: Any) -> list[Any]:
        known = dict(zip([tensor.name for tensor in feeds], values, strict=True))
        inside = tf.compat.v1.get_default_graph()
        known.update((name, inside.capture(external[name])) for name in captured)
        names = [tensor.name for tensor in results if tensor.name not in known]
        made = tf.graph_util.import_graph_def(description, input_map=known, return_elements=names, name="")
        known.update(zip(names, made, strict=True))
        return [known[tensor.name] for tensor in results]

    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in feeds]
    function: Callable[..., list[Any]] = tf.function(run, specs, autograph=False).get_concrete_function()
    return function


def _describe(graph: Any, ops: set[Any]) -> Any:
    """GraphDef of some operations, without control edges to others."""
    everything = graph.as_graph_def()
    names = {op.name for op in ops}
    chosen = tf.compat.v1.GraphDef(versions=everything.versions, library=everything.library)
    before = ""
    for op, node in zip(graph.get_operations(), everything.node, strict=True):
        if op not in ops:
            continue
        assert op.name == node.name
        waits_for = [name for name in node.input if name[0] == "^" and name[1:] in names]
        inputs = [name for name in node.input if name[0] != "^"]
        if op.op_def.is_stateful and op.type not in UNORDERED:
            waits_for += [before] if before and before not in waits_for else []
            before = f"^{op.name}"
        added = chosen.node.add()
        added.CopyFrom(node)
        del added.input[:]
        added.input.extend(inputs + waits_for)
        added.attr.pop("_class", None)  # colocation with operations that may be missing here
    return chosen
