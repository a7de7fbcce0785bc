"""Partition a model into consecutive segments of similar size, gathered one at a time (ZeRO stage 3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import keras

from tf_dist.pipeline.model_partition import LayerGraph, keep_head, one_or_all, used

# Adjacent layers are merged up to this many weights (4 MiB): each segment costs calls and messages.
TOGETHER = 1 << 20


@dataclass
class ShardSegment:
    """Consecutive layers of a model.

    model: from its input tensor to its output tensor; shares the layers of the full model.
    numbers: the trainable variables that it uses, by index in the full model. own: those that no earlier
    segment uses. reads_rows: whether it takes the rows as well, as a second input.
    """

    model: keras.Model
    numbers: list[int]
    own: list[int] = field(default_factory=list)
    reads_rows: bool = False


def segments(model: keras.Model, together: int = TOGETHER) -> list[ShardSegment]:
    """Split a model into segments of about ``together`` weights, as far as its cut points allow.

    Raises:
        UsageError: the model's layer graph is unknown; or a layer computes a mask, which would not cross a
            cut.
    """
    place = {id(variable): number for number, variable in enumerate(model.trainable_variables)}
    sizes = [prod(variable.shape) for variable in model.trainable_variables]
    graph = LayerGraph(model, "--zero-stage 2", masks=sum(sizes) <= together)
    ends = [(graph.input, 0), *((one.tensor, one.place) for one in graph.points)]
    ends.append((graph.output, len(graph.nodes)))

    def numbers(begin: int, end: int) -> list[int]:
        """The trainable variables between two cut points."""
        nodes = graph.nodes[ends[begin][1] : ends[end][1]]
        return sorted({place[id(v)] for node in nodes for v in used(node) if id(v) in place})

    cuts = [0]
    for end in range(2, len(ends)):
        alone = numbers(end - 1, end)
        if alone and sum(sizes[i] for i in numbers(cuts[-1], end)) > together:
            cuts.append(end - 1)
    made: list[ShardSegment] = []
    seen: set[int] = set()
    for begin, end in zip(cuts, [*cuts[1:], len(ends) - 1], strict=True):
        mine = numbers(begin, end)
        inputs = graph.inputs_of(ends[begin][0], graph.nodes[ends[begin][1] : ends[end][1]])
        part = keras.Model(one_or_all(inputs), ends[end][0])
        made.append(ShardSegment(part, mine, [i for i in mine if i not in seen], len(inputs) > 1))
        seen.update(mine)
    keep_head(made[-1].model, inputs, model)
    return made
