"""Lower bound of a rank's memory, and the refusal of a model that exceeds what is free.

It counts weights, one gradient and the state of known optimizers. Activations and TensorFlow's workspace come
on top, so a model that passes may still run out of memory later.
"""

from __future__ import annotations

from math import prod

import keras
import tensorflow as tf

from tf_dist.comm.runtime.memory_limits import gib, refuse_too_much
from tf_dist.config import Config
from tf_dist.models.meta_init import is_deferred
from tf_dist.parallel.cost_model import FLOAT32, state_bytes
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.sharding import part_of

# Slots (arrays as large as the weights) of known optimizers; those of others are not counted.
SLOTS = {"adam": 2, "adamw": 2, "muon": 2, "nadam": 2, "adamax": 2, "lion": 1, "adagrad": 1}


def check_room(model: keras.Model, config: Config, mesh: Mesh) -> None:
    """Refuse a model whose weights, gradient and optimizer state exceed a rank's memory; a collective.

    Args:
        model: with all layers, with or without values. One that is not built yet is not checked.
        config: of the run.
        mesh: all ranks.

    Raises:
        OutOfMemory: on every rank.
    """
    if tf.config.list_physical_devices("GPU"):
        return  # weights are in their memory
    sizes = [prod(part_of(variable).shape) for variable in model.trainable_variables]
    there = FLOAT32 * sum(
        size
        for size, variable in zip(sizes, model.trainable_variables, strict=True)
        if not is_deferred(variable)
    )
    # Stages of a pipeline have about equal sizes, and the largest is at least the mean.
    parameters = sum(sizes) / config.pipeline_parallel
    needed = certain_bytes(parameters, config, mesh) + _frozen_bytes(model) / config.pipeline_parallel
    what = f"weights, gradient and optimizer state of {parameters:,.0f} parameters: {gib(needed)} each"
    refuse_too_much(mesh.all, max(0, int(needed) - there), what)


def _frozen_bytes(model: keras.Model) -> int:
    """Of frozen weights that are not there yet: a rank has no gradient and no state of them."""
    frozen = [variable for variable in model.weights if not variable.trainable and is_deferred(variable)]
    return FLOAT32 * sum(prod(part_of(variable).shape) for variable in frozen)


def certain_bytes(parameters: float, config: Config, mesh: Mesh) -> float:
    """Bytes of a rank for ``parameters`` of its own, by `tf_dist.parallel.cost_model.state_bytes`.

    A single rank holds the gradient of a micro-batch twice for a moment: per variable, and flat. From the
    second one on it also holds their sum. Replicas with local steps keep the weights of the last
    synchronization, and the outer momentum.
    """
    strategy = config.chosen_strategy()
    traits, copies = strategy.traits, strategy.weight_copies
    steps = not traits.optimizer_on_root or mesh.replicas.rank == 0
    slots = SLOTS.get(config.optimizer.lower(), 0) if steps else 0
    more = FLOAT32 * parameters * min(2, config.micro_batches) if mesh.all.size == 1 else 0
    own = state_bytes(parameters, mesh.replicas.size, traits.sharding, slots)
    return own + more + FLOAT32 * parameters * copies
