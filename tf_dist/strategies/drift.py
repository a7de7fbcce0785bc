"""Replicas that step by themselves: between synchronizations their weights and optimizers drift apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from tf_dist.parallel.tree import one_each
from tf_dist.strategies.base import Context, Strategy


class Drifting(Strategy):
    """A strategy whose replicas are equal only where they have met."""

    def __init__(self, options: Any = None, **given: Any) -> None:
        super().__init__(options, **given)
        self._together = self._state_together = True

    def _part(self) -> None:
        """From now on each replica goes its own way."""
        self._together = self._state_together = False

    @property
    def in_sync(self) -> bool:
        """As in `Strategy`."""
        return self._together

    def consolidate(self) -> None:
        """As in `Strategy`: all go on with the mean of their optimizers."""
        if not self._state_together:
            average_optimizer(self.context)
            self._state_together = True


def average_optimizer(context: Context) -> None:
    """Give all replicas the mean of their optimizers' state, weighed by their shares of the work.

    Single numbers, such as the count of steps, are equal already. A collective.
    """
    comm = context.mesh.replicas
    order, share = one_each(comm.size), len(context.micro_batches) / context.count
    for variable in context.optimizer.variables:
        if variable.shape and "float" in str(variable.dtype):
            term = np.asarray(variable.value, np.float32).reshape(-1) * np.float32(share)
            total = comm.allreduce_terms([term], order, term).array
            variable.assign(total.reshape(variable.shape).astype(variable.dtype))
