"""Find the optimizers that a model steps with, and the Comm of each."""

from __future__ import annotations

from typing import Any

import keras

from tf_dist.comm.transport.base import Comm
from tf_dist.keras_fit.gradient_reduction import Reduction


def optimizers_of(model: Any) -> list[Any]:
    """The optimizer of ``compile``, and those that a model of several has as attributes (a GAN's)."""
    found = [getattr(model, "optimizer", None)]
    for value in list(vars(model).values()) if model is not None else []:
        found += value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    optimizers = [one for one in found if isinstance(one, keras.optimizers.Optimizer)]
    return list({id(one): one for one in optimizers}.values())


def reduction_of(optimizer: Any) -> Reduction | None:
    """The `Reduction` of a distributed optimizer, also inside a `LossScaleOptimizer`; or None."""
    while optimizer is not None:
        reduction = getattr(optimizer, "reduction", None)
        if isinstance(reduction, Reduction):
            return reduction
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return None


def distributed_of(model: Any) -> list[Any]:
    """The optimizers of a model that are distributed: they carry ``comm``, ``reduction`` and ``visits``."""
    found = []
    for optimizer in optimizers_of(model):
        while optimizer is not None and not hasattr(type(optimizer), "visits"):
            optimizer = getattr(optimizer, "inner_optimizer", None)
        if optimizer is not None:
            found.append(optimizer)
    return found


def comm_of(model: Any) -> Comm | None:
    """The ranks that a model's optimizers are distributed over, or None."""
    found = distributed_of(model)
    return found[0].comm if found else None
