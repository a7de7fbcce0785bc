"""DiLoCo: local steps, and an outer optimizer for the changes they made (Douillard et al. 2023).

The outer gradient is the mean change of the replicas since the last synchronization; an outer step is SGD
with Nesterov momentum. Formulas, fragments (Streaming DiLoCo) and delays are in `local_sgd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tf_dist.errors import UsageError
from tf_dist.strategies.base import option, steps_between
from tf_dist.strategies.local_sgd import GROUP, LocalSGD, LocalSGDOptions


@dataclass(frozen=True)
class DiLoCoOptions(LocalSGDOptions):
    """When replicas synchronize, and the outer optimizer.

    Attributes:
        outer_lr: eta.
        outer_momentum: mu.
    """

    sync_every: int = steps_between(50)
    outer_lr: float = option(0.7, GROUP, "learning rate of diloco's outer optimizer", least=0)
    outer_momentum: float = option(0.9, GROUP, "Nesterov momentum of diloco's outer optimizer", least=0)


class DiLoCo(LocalSGD):
    """DiLoCo, with AdamW as inner and Nesterov momentum as outer optimizer.

    Raises:
        UsageError: a synchronization would change no weight, or the momentum never decays.
    """

    name, Options = "diloco", DiLoCoOptions

    def __init__(self, options: DiLoCoOptions | None = None, **given: Any) -> None:
        super().__init__(options, **given)
        self.outer_lr, self.outer_momentum = self.options.outer_lr, self.options.outer_momentum
        if self.outer_lr <= 0:
            raise UsageError(f"outer_lr is {self.outer_lr:g}: with 0 no meeting changes a weight; use 0.7")
        if self.outer_momentum >= 1:
            raise UsageError(f"outer_momentum is {self.outer_momentum:g}: it must be below 1; use 0.9")
