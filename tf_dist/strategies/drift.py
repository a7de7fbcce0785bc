"""Strategies with local steps: weights and optimizers of replicas drift apart between synchronizations."""

from __future__ import annotations

from typing import Any

import numpy as np

from tf_dist.parallel.reduction_tree import one_each
from tf_dist.strategies.base import Context, Strategy


class Drifting(Strategy):
    """A strategy whose replicas are equal only right after a synchronization."""

    def __init__(self, options: Any = None, **given: Any) -> None:
        super().__init__(options, **given)
        self._together = self._state_together = True

    def _part(self) -> None:
        """Note that replicas are no longer equal."""
        self._together = self._state_together = False

    @property
    def in_sync(self) -> bool:
        """As in `Strategy`."""
        return self._together

    def consolidate(self) -> None:
        """As in `Strategy`: all continue with the mean of their optimizers."""
        if not self._state_together:
            average_optimizer(self.context)
            self._state_together = True


def average_optimizer(context: Context) -> None:
    """Set all replicas to the mean of their optimizers' states, weighted by their shares of the work.

    Scalars, such as the step count, are equal already. A collective.
    """
    comm = context.mesh.replicas
    order, share = one_each(comm.size), len(context.micro_batches) / context.count
    for variable in context.optimizer.variables:
        if variable.shape and "float" in str(variable.dtype):
            term = np.asarray(variable.value, np.float32).reshape(-1) * np.float32(share)
            total = comm.allreduce_terms([term], order, term).array
            variable.assign(total.reshape(variable.shape).astype(variable.dtype))
