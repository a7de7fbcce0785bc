"""`FusedOptimizer`: one step of an optimizer from one flat gradient.

Legend: P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.optim import elementwise
from tf_dist.parallel.sharding import part_of
from tf_dist.parallel.tensor_shard import TensorShard, variable_shard


class FusedOptimizer:
    """One step of an optimizer from a flat gradient, traced once.

    Args:
        optimizer: a Keras optimizer, built for ``variables``.
        variables: Keras variables, in the order of the flat gradient.
        compiled: whether XLA compiles the step as a whole.

    Attributes:
        reason: why each variable is updated separately; empty if it is not.
        has_all_slots: whether this optimizer holds the complete state of each of these variables.
    """

    reason = ""
    has_all_slots = True

    def __init__(self, optimizer: Any, variables: Sequence[Any], compiled: bool) -> None:
        self.optimizer, self.variables = optimizer, list(variables)
        sizes = [int(np.prod(variable.shape, dtype=np.int64)) for variable in variables]
        self.parts = [range(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        signature = [tf.TensorSpec((sum(sizes),), tf.float32), tf.TensorSpec((), tf.float32)]
        self._step = tf.function(self._graph, signature, jit_compile=compiled, autograph=False)

    def apply(self, gradient_P: np.ndarray | tf.Tensor, scale: Any) -> None:
        """Take one step with ``scale * gradient``, (P,) float32."""
        self._step(gradient_P, scale)

    def slot_shards(self, place: int, slot: str) -> list[TensorShard]:
        """Shards, on this rank, of the state ``slot`` (an attribute of the optimizer) of a variable."""
        part = part_of(self.variables[place])
        return [variable_shard(elementwise.slots_of(self.optimizer)[slot][place], part)]

    def shared_variables(self) -> list[Any]:
        """The optimizer's variables that are the same on all replicas."""
        return list(self.optimizer.variables)

    def give_back(self) -> None:
        """Restore the optimizer's own variables, as after separate updates; `apply` may be called again."""

    def _graph(self, gradient_P: tf.Tensor, scale: Any) -> None:
        raise NotImplementedError
