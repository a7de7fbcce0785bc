"""Partition a model into consecutive segments, at tensors that alone connect its input and output.

In a chain of layers that is each layer's output; inside a residual block there is none, as two tensors run
in parallel. Segments share their layers with the full model (`keras.Model` between two of its tensors).

What is computed from the rows without weights, such as a mask of padding, does not count: every segment that
needs it takes the rows as a second input, and computes it again.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf, prod
from typing import Any

import keras

from tf_dist.errors import UsageError
from tf_dist.models.lm_head import LanguageModelHead, head_of, with_known_head
from tf_dist.models.model_outputs import same_outputs

# Layer names of this package's models: layer_3, or layer_3_attention.
BLOCK = re.compile(r"layer_(\d+)(?:_|$)")


@dataclass(frozen=True)
class CutPoint:
    """A tensor at which a model can be cut.

    tensor: the `keras.KerasTensor`. place: number of nodes of the layer graph before it. next: name of
    the following layer. block: number of the block (layer_N) that begins there, or None.
    """

    tensor: Any
    place: int
    next: str
    block: int | None


@dataclass
class ModelSegment:
    """Consecutive layers of a model.

    model: from the preceding tensor, or token ids, to the following tensor, or logits; the last segment has
    the full `LanguageModelHead`. reads_rows: whether it takes the rows as well, as a second input.
    variables: trainable and not, in the order of the full model, without the states of random generators.
    cost: see `costs`.
    """

    model: keras.Model
    variables: list[Any]
    cost: float
    reads_rows: bool = False

    @property
    def trainable(self) -> list[Any]:
        """Its trainable variables."""
        return [variable for variable in self.variables if variable.trainable]


class LayerGraph:
    """The layer graph of a model, in topological order.

    Args:
        model: functional or sequential, from token ids (B, T) to logits (B, T, V); or with deferred
            initialization.
        instead: the option that avoids cuts, for error messages.
        masks: whether layers may compute masks, which do not cross a cut: True if there will be no cuts.

    Attributes:
        nodes: calls of layers, without inputs.
        points: possible cuts, from input to output.
        of_rows: ids of the tensors that depend on the rows and on no weights, the rows included.

    Raises:
        UsageError: the model's layer graph is unknown (a subclassed model), or it passes masks along.
    """

    def __init__(
        self, model: keras.Model, instead: str = "--pipeline-parallel 1", masks: bool = False
    ) -> None:
        self.model = model
        function = getattr(model, "_functional", model)
        if not isinstance(function, keras.src.models.Functional):
            raise UsageError(
                f"model {model.name!r} is a {type(model).__name__}: only functional and sequential models "
                "say which layer follows which, and can be cut into stages. Build it by keras.Model(inputs, "
                f"outputs), or set {instead}"
            )
        if len(function.inputs) != 1 or len(function.outputs) != 1:
            raise UsageError(f"model {model.name!r} must have one input and one output to be cut into stages")
        self.input, self.output = function.inputs[0], function.outputs[0]
        depths = sorted(function._nodes_by_depth, reverse=True)
        everything = [node for depth in depths for node in function._nodes_by_depth[depth]]
        self.nodes = [node for node in everything if not node.is_input]
        for node in [] if masks else self.nodes:
            _refuse_masks(node.operation)
        self.of_rows = self._tensors_of_rows()
        self.points = self._find_points()

    def _find_points(self) -> list[CutPoint]:
        uses = Counter(id(tensor) for node in self.nodes for tensor in node.input_tensors)
        uses[id(self.output)] += 1
        head = head_of(self.model)
        # After the hidden states there is only the LM head, which the loss computes with them.
        last = self.output if head is None else head.trunk.outputs[0]
        live, points = dict[int, Any](), list[CutPoint]()
        begun: set[int] = set()
        for place, node in enumerate(self.nodes):
            carried = next(iter(live.values()), None)
            if carried is last:
                break
            block = _block(node)
            if len(live) == 1 and self._can_begin(carried, place):
                new = block if block is not None and block not in begun else None
                points.append(CutPoint(carried, place, node.operation.name, new))
            begun |= {block} - {None}  # type: ignore[arg-type]
            for tensor in node.input_tensors:
                uses[id(tensor)] -= 1
                if not uses[id(tensor)]:
                    live.pop(id(tensor), None)
            made = [tensor for tensor in node.output_tensors if uses[id(tensor)]]
            live.update((id(tensor), tensor) for tensor in made if id(tensor) not in self.of_rows)
        return points

    def _can_begin(self, carried: Any, place: int) -> bool:
        """Whether a segment can begin with a node, if only one tensor connects it with those before."""
        if all(id(tensor) in self.of_rows for tensor in self.nodes[place].output_tensors):
            return False  # computed again in each segment that needs it
        layer = carried._keras_history.operation
        if head_of(self.model) is None and any(one.operation is layer for one in self.nodes[place:]):
            return False  # Keras cannot cut between such calls; a head is no call, the loss computes it
        on_rows = [one for one in self.nodes if id(one.input_tensors[0]) in self.of_rows]
        twice = sum(one.operation is layer for one in on_rows) > 1
        return not twice and bool(keras.backend.is_float_dtype(carried.dtype))

    def _tensors_of_rows(self) -> set[int]:
        found = {id(self.input)}
        for node in self.nodes:
            given = {id(tensor) for tensor in node.input_tensors}
            if given <= found and not getattr(node.operation, "variables", ()):
                found.update(id(tensor) for tensor in node.output_tensors)
        return found

    def inputs_of(self, begin: Any, nodes: Sequence[Any]) -> list[Any]:
        """The inputs of a segment: its first tensor, and the rows if it needs them.

        Args:
            begin: the tensor with which it begins.
            nodes: of the segment.
        """
        used_again = {id(t) for node in nodes for t in node.input_tensors} & self.of_rows
        return [begin, self.input] if used_again and begin is not self.input else [begin]

    def segments(self, cuts: Sequence[CutPoint]) -> list[ModelSegment]:
        """The segments of the model for these cuts.

        Raises:
            UsageError: a segment has no trainable weights; or a layer's random numbers would depend on the
                cuts.
        """
        tensors = [self.input, *(cut.tensor for cut in cuts), self.output]
        places = [0, *(cut.place for cut in cuts), len(self.nodes)]
        each = costs(self.nodes)
        parts = [self.nodes[start:stop] for start, stop in pairwise(places)]
        self._refuse_shared_draws(parts)
        made = []
        for number, (part, (begin, end)) in enumerate(zip(parts, pairwise(tensors), strict=True)):
            inputs = self.inputs_of(begin, part)
            model = keras.Model(one_or_all(inputs), end, name=f"{self.model.name}_{number}")
            if number == len(cuts):
                keep_head(model, inputs, self.model)
            cost = sum(each[places[number] : places[number + 1]])
            segment = ModelSegment(model, self._needed(part), cost, reads_rows=len(inputs) > 1)
            if not segment.trainable:
                raise UsageError(
                    f"stage {number} of {len(parts)} ({', '.join(n.operation.name for n in part)}) has no "
                    "trainable weights: use fewer stages, other --pipeline-cuts, or freeze fewer layers"
                )
            made.append(segment)
        return made

    def _needed(self, nodes: Sequence[Any]) -> list[Any]:
        wanted = {id(variable) for node in nodes for variable in used(node)}
        return [variable for variable in self.model.variables if id(variable) in wanted]

    def _refuse_shared_draws(self, parts: Sequence[Sequence[Any]]) -> None:
        """Refuse a random generator of several segments: its state would depend on another rank's draws."""
        seen: dict[int, int] = {}
        for number, part in enumerate(parts):
            for node in part:
                for variable in getattr(node.operation, "variables", ()):
                    if is_generator(variable) and seen.setdefault(id(variable), number) != number:
                        raise UsageError(
                            f"layer {node.operation.name!r} draws random numbers and is used in stages "
                            f"{seen[id(variable)]} and {number}: make a layer of its own for each use"
                        )


def choose(graph: LayerGraph, count: int, wanted: str = "") -> list[CutPoint]:
    """Choose the cuts that split a model into ``count`` segments.

    Args:
        graph: of the model.
        count: segments.
        wanted: the blocks (layer_N) with which all segments but the first begin, as in "2,4"; for a model
            without such blocks, indices in the list of possible cuts, counted from 1. Empty: segments of
            equal cost.

    Raises:
        UsageError: fewer cuts are possible; or the requested ones are not.
    """
    if len(graph.points) < count - 1:
        raise UsageError(
            f"model {graph.model.name!r} can be cut at {len(graph.points)} places, {count} stages need "
            f"{count - 1} cuts: {_possible(graph.points)}. Use fewer stages or more layers"
        )
    if wanted.strip():
        return _wanted(graph.points, count, wanted)
    cuts = balanced(graph, count)
    if cuts is None:
        raise UsageError(
            f"model {graph.model.name!r} has too few layers with trained weights for {count} stages: use "
            "fewer stages or more layers, or let --freeze name fewer of them"
        )
    return [graph.points[at] for at in cuts]


def balanced(graph: LayerGraph, count: int) -> list[int] | None:
    """The cuts, as indices of cut points, that minimize the highest cost of ``count`` segments.

    Among these, cuts with the smallest sum of squared costs, as far as dynamic programming finds them. Every
    segment has trainable weights; None: there are no such cuts.
    """
    places = [0, *(point.place for point in graph.points), len(graph.nodes)]
    sums = [0.0, *accumulate(costs(graph.nodes))]
    weights = [0, *accumulate(sum(v.trainable for v in used(node)) for node in graph.nodes)]

    def segment(start: int, stop: int) -> float:
        """Cost of the nodes between two places; infinite if they have no weights."""
        return sums[stop] - sums[start] if weights[stop] > weights[start] else inf

    # For each number of cuts so far, and each end of the last segment: the cost, and the cuts.
    best: list[tuple[float, float, tuple[int, ...]]] = [
        (segment(0, stop), segment(0, stop) ** 2, ()) for stop in places
    ]
    for _ in range(count - 1):
        longer: list[tuple[float, float, tuple[int, ...]]] = []
        for end, stop in enumerate(places):
            found: tuple[float, float, tuple[int, ...]] = (inf, inf, ())
            for before in range(1, end):
                most, squares, cuts = best[before]
                more = segment(places[before], stop)
                found = min(found, (max(most, more), squares + more * more, (*cuts, before - 1)))
            longer.append(found)
        best = longer
    return list(best[-1][2]) if best[-1][0] < inf else None


def costs(nodes: Sequence[Any]) -> list[float]:
    """Multiply-adds per token in the forward pass of each node, counted from weights and shapes.

    One product with each matrix per token; attention costs 2 T D more (no causal skipping); other layers
    make a pass over their result. The backward pass costs twice that in every layer, so it does not affect
    the balance.
    """
    return [_products(node) + _elements(node.output_tensors[0].shape) for node in nodes]


def used(node: Any) -> list[Any]:
    """The variables that one call of a layer uses, without the states of random generators."""
    layer = node.operation
    if isinstance(layer, keras.layers.ReversibleEmbedding) and not layer.tie_weights:
        return [layer.reverse_embeddings if node.arguments.kwargs.get("reverse") else layer.embeddings]
    return [variable for variable in getattr(layer, "variables", ()) if not is_generator(variable)]


def is_generator(variable: Any) -> bool:
    """Whether a variable is the state of a random generator."""
    return str(variable.path).endswith("seed_generator_state")


def _products(node: Any) -> float:
    layer, x = node.operation, node.input_tensors[0]
    if isinstance(layer, keras.layers.Embedding) and not node.arguments.kwargs.get("reverse"):
        return 0.0
    matrices = [
        tuple(v.shape) for v in used(node) if len(v.shape) > 1 and tuple(v.shape) != tuple(x.shape[1:])
    ]
    attends = hasattr(layer, "heads") or hasattr(layer, "num_heads")
    return sum(map(prod, matrices)) + (2.0 * prod(x.shape[1:]) if attends else 0.0)


def _elements(shape: Sequence[int | None]) -> float:
    """Elements of a result (B, T, ...) per token."""
    return float(prod(n for n in shape[2:] if n))


def _block(node: Any) -> int | None:
    found = BLOCK.match(node.operation.name)
    return int(found[1]) if found else None


def keep_head(last: keras.Model, inputs: Sequence[Any], whole: keras.Model) -> None:
    """Declare the full model's outputs and head of the last segment: they decide how its loss is computed.

    Args:
        last: the segment.
        inputs: the full model's tensors that it takes.
        whole: the full model.
    """
    same_outputs(last, whole)
    head = head_of(whole)
    if head is not None:
        trunk = keras.Model(one_or_all(inputs), head.trunk.outputs[0], name=f"{last.name}_trunk")
        with_known_head(last, LanguageModelHead(trunk, head.embedding))


def one_or_all(tensors: Sequence[Any]) -> Any:
    """The only tensor, or a list of several: what a Keras model takes."""
    return tensors[0] if len(tensors) == 1 else list(tensors)


def _refuse_masks(layer: Any) -> None:
    if getattr(layer, "mask_zero", False) or isinstance(layer, keras.layers.Masking):
        raise UsageError(
            f"layer {layer.name!r} makes a mask, which does not travel with activations from stage to stage: "
            "padding needs none, for its targets are not counted"
        )


def _possible(points: Sequence[CutPoint]) -> str:
    blocks = [str(point.block) for point in points if point.block is not None]
    if blocks:
        return f"a stage can begin with block {', '.join(blocks)}"
    return "a stage can begin with " + (
        ", ".join(f"{at} ({point.next})" for at, point in enumerate(points, 1)) or "no layer but the first"
    )


def _wanted(points: Sequence[CutPoint], count: int, text: str) -> list[CutPoint]:
    by_number = {point.block: point for point in points if point.block is not None}
    by_number = by_number or dict(enumerate(points, 1))
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--pipeline-cuts {text}: numbers are needed, as in 2,4") from None
    if len(numbers) != count - 1:
        raise UsageError(f"--pipeline-cuts {text} has {len(numbers)} cuts, {count} stages need {count - 1}")
    strange = [number for number in numbers if number not in by_number]
    if strange or sorted(set(numbers)) != numbers:
        what = f"{strange[0]} is not among them" if strange else "each must be larger than the one before"
        raise UsageError(f"--pipeline-cuts {text}: {_possible(points)}; {what}")
    return [by_number[number] for number in numbers]
