"""What a Keras optimizer has to do with replicas that step by themselves: their state is each one's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from tf_dist.parallel.local import LocalSteps, one_each
from tf_dist.parallel.mesh import Mesh


class Held:
    """A flat array, as the sentinel looks at a variable."""

    def __init__(self, array: np.ndarray) -> None:
        self.value, self.shape, self.dtype = array, array.shape, str(array.dtype)

    def assign(self, array: np.ndarray) -> None:
        """Take over its values."""
        np.copyto(self.value, array)


def average_state(optimizer: Any, local: LocalSteps, micro_batches: int, mesh: Mesh) -> None:
    """Give all replicas the mean of their optimizers' state, weighed by their micro-batches; a collective.

    A checkpoint has one optimizer. So that a run that goes on from it and one that was never stopped are the
    same, both go on with it. Single numbers, such as the count of steps, are equal already.

    Args:
        optimizer: of this rank.
        local: knows whether this is necessary.
        micro_batches: of a step, of all replicas.
        mesh: all ranks.
    """
    if local.state_together:
        return
    share = np.float32(len(local.micro_batches) / micro_batches)
    order = one_each(mesh.replicas.size)
    for variable in optimizer.variables:
        if variable.shape and "float" in str(variable.dtype):
            term = np.asarray(variable.value, np.float32).reshape(-1) * share
            total = mesh.replicas.allreduce_terms([term], order, term).array
            variable.assign(total.reshape(variable.shape).astype(variable.dtype))
    local.state_together = True
