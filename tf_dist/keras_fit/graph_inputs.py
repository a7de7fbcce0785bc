"""Dependency analysis of a TensorFlow graph: which inputs a tensor is computed from."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

# What they say of a tensor does not depend on its values.
SHAPES_ONLY = {"Shape", "ShapeN", "Size", "Rank"}


def depends_on(tensor: Any, data: Any) -> bool:
    """Whether the values of a tensor may depend on those of some others, of one graph.

    Args:
        tensor: of the graph that is being traced.
        data: a nest of tensors. None: nothing is known of them, and everything may depend on them.

    Returns:
        True also where it depends on an input of an inner graph, of which nothing is known.
    """
    if data is None:
        return True
    sources = {leaf.op for leaf in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(leaf)}
    seen, waiting = set(), [tensor.op]
    while waiting:
        op = waiting.pop()
        if op in sources or (op.type == "Placeholder" and op.outputs[0].dtype != tf.resource):
            return True
        if op not in seen and op.type not in SHAPES_ONLY:
            seen.add(op)
            waiting += [one.op for one in op.inputs]
    return False
