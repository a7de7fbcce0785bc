"""All patches of Keras, applied once per process; they act only on models that train over ranks.

An optimizer cannot reach them by itself. `self_test` asks whether Keras calls them as they take it for.

* Keras puts a `LossScaleOptimizer` around the optimizer of a mixed_float16 model, and a step must be skipped
  by all ranks or by none (here).
* What a step is: `train_function`, `gradient_law`, `global_losses`, `global_metrics`, `global_batch_norm`,
  `rank_randomness`.
* What a call is, and its data: `calls`. Who calls back where: `fit_callbacks`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import keras

from tf_dist.keras_fit import (
    calls,
    fit_callbacks,
    global_batch_norm,
    global_losses,
    global_metrics,
    gradient_law,
    rank_randomness,
    saving,
    train_function,
)


def install() -> None:
    """Patch Keras; any further call changes nothing.

    Raises:
        LaunchError: this Keras is not as the patches take it for.
    """
    calls.check_keras()
    fit_callbacks.install()
    for module in (
        train_function,
        gradient_law,
        global_losses,
        global_metrics,
        global_batch_norm,
        rank_randomness,
        saving,
        calls,
    ):
        module.install()
    scaler = keras.optimizers.LossScaleOptimizer
    if not hasattr(scaler.check_finite, "__wrapped__"):
        scaler.check_finite = _on_all_ranks(scaler.check_finite)


def _on_all_ranks(check_finite: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(check_finite)
    def check(self: Any, grads: Any) -> Any:
        finite = check_finite(self, grads)
        # A distributed LossScaleOptimizer has reduced already what it asks about.
        reduction = getattr(self.inner_optimizer, "reduction", None)
        return reduction.all_finite(finite) if reduction else finite

    return check
