"""Options of the loss that is trained on; validation has the plain cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options
from tf_dist.errors import UsageError

option = partial(options.option, group="loss")


@dataclass(frozen=True)
class LossOptions(options.Options):
    """What is added to the cross-entropy in training."""

    label_smoothing: float = option(
        0.0, text="share of a target's probability that all classes get (Szegedy et al. 2016)", least=0
    )
    z_loss: float = option(
        0.0, text="factor of the squared logarithm of the softmax's sum, as 1e-4 (PaLM)", least=0
    )

    def check(self) -> None:
        """Refuse smoothing that leaves the target nothing."""
        if self.label_smoothing >= 1:
            raise UsageError(
                f"label_smoothing is {self.label_smoothing}, which leaves nothing of the target: below 1"
            )
