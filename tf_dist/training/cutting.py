"""A functional Keras model in consecutive segments, cut where a single tensor goes from one to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from tf_dist.errors import UsageError
from tf_dist.models.head import Head, head_of, with_known_head

# Neighbours are joined up to this many weights (4 MiB): each one costs calls and messages.
TOGETHER = 1 << 20


@dataclass
class Segment:
    """Some consecutive layers of a model.

    model: from the tensor that comes in to the one that goes out; shares the layers of the whole model.
    numbers: its trainable variables, by place in the whole model. own: those that no earlier segment uses.
    """

    model: keras.Model
    numbers: list[int]
    own: list[int] = field(default_factory=list)


def segments(model: keras.Model, together: int = TOGETHER) -> list[Segment]:
    """Cut a model into segments of about ``together`` weights, as far as it lets itself be cut.

    Raises:
        UsageError: the model is not a functional one.
    """
    place = {id(variable): number for number, variable in enumerate(model.trainable_variables)}
    sizes = [int(np.prod(variable.shape, dtype=np.int64)) for variable in model.trainable_variables]
    tensors = [model.inputs[0], *_cuts(model), model.outputs[0]]
    made: list[Segment] = []
    begun = 0
    for end in range(1, len(tensors)):
        one = _segment(tensors[end - 1], tensors[end], place)
        wider = _segment(tensors[begun], tensors[end], place) if made else one
        if made and (not one.numbers or sum(sizes[i] for i in wider.numbers) <= together):
            made[-1] = wider
        else:
            begun = end - 1
            made.append(one)
    _keep_head(model, made[-1].model, tensors[begun])
    seen: set[int] = set()
    for one in made:
        one.own = [number for number in one.numbers if number not in seen]
        seen.update(one.numbers)
    return made


def _segment(first: Any, last: Any, place: dict[int, int]) -> Segment:
    inner = keras.Model(first, last)
    return Segment(inner, sorted({place[id(variable)] for variable in inner.trainable_variables}))


def _keep_head(model: keras.Model, last: keras.Model, first: Any) -> None:
    """Let the last segment know the head of the whole model, so that its loss can be taken in chunks.

    ``first`` is the whole model's tensor with which the segment begins.
    """
    head = head_of(model)
    if head is not None:
        with_known_head(last, Head(keras.Model(first, head.trunk.outputs[0]), head.embedding))


def _cuts(model: keras.Model) -> list[Any]:
    """The tensors that are, each of them, all that later layers know of earlier ones; in order."""
    by_depth = getattr(model, "_nodes_by_depth", None)
    if by_depth is None or len(model.inputs) != 1 or len(model.outputs) != 1:
        raise UsageError(
            f"model {model.name!r} cannot be cut into segments: it is not a functional keras.Model with one "
            "input and one output. Use --zero-stage 2, or make it by keras.Model(tokens, logits)"
        )
    nodes = [
        node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input
    ]
    last_use = {id(tensor): at for at, node in enumerate(nodes) for tensor in node.input_tensors}
    last_use[id(model.outputs[0])] = len(nodes)
    live = {id(model.inputs[0]): model.inputs[0]}
    head, found = head_of(model), []
    for at, node in enumerate(nodes):
        live.update({id(tensor): tensor for tensor in node.outputs})
        live = {key: tensor for key, tensor in live.items() if last_use.get(key, -1) > at}
        (first, *others) = live.values()
        ends = first is model.outputs[0] or (head is not None and first is head.trunk.outputs[0])
        if not others and not ends and first is not model.inputs[0]:
            found.append(first)
    return found
