"""What a rank will certainly hold of a model, and a refusal where it cannot.

Only what is certain counts: weights, one gradient and the state of optimizers that are known. Activations and
what TensorFlow computes with come on top, so that a model may be let through and be refused memory later.
"""

from __future__ import annotations

from math import prod

import keras
import tensorflow as tf

from tf_dist.comm.room import gib, refuse_too_much
from tf_dist.config import Config
from tf_dist.models.outline import is_outline
from tf_dist.parallel.cost import FLOAT32, state_bytes
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.parts import part_of

# Arrays as large as the weights that an optimizer keeps; of others it is not known, and not counted.
SLOTS = {"adam": 2, "adamw": 2, "nadam": 2, "adamax": 2, "lion": 1, "adagrad": 1}


def check_room(model: keras.Model, config: Config, mesh: Mesh) -> None:
    """Refuse a model whose weights, gradient and optimizer state this rank cannot have; a collective.

    Args:
        model: of the whole depth, with or without its values. Of one that is not built yet nothing is known.
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
        if not is_outline(variable)
    )
    # Stages of a pipeline are of about equal size, and the largest has no less than the mean.
    parameters = sum(sizes) / config.pipeline_parallel
    needed = certain_bytes(parameters, config, mesh)
    what = f"weights, gradient and optimizer state of {parameters:,.0f} parameters: {gib(needed)} each"
    refuse_too_much(mesh.all, max(0, int(needed) - there), what)


def certain_bytes(parameters: float, config: Config, mesh: Mesh) -> float:
    """Bytes of a rank for ``parameters`` of its own, by `tf_dist.parallel.cost.state_bytes`.

    One rank alone has the gradient of a micro-batch twice for a moment: of each variable, and as one array.
    From the second on there is the sum of those before, too. Replicas that step by themselves keep the
    weights with which they met, and the outer momentum.
    """
    strategy = config.chosen_strategy()
    traits, copies = strategy.traits, strategy.weight_copies
    steps = not traits.optimizer_on_root or mesh.replicas.rank == 0
    slots = SLOTS.get(config.optimizer.lower(), 0) if steps else 0
    more = FLOAT32 * parameters * min(2, config.micro_batches) if mesh.all.size == 1 else 0
    own = state_bytes(parameters, mesh.replicas.size, traits.sharding, slots)
    return own + more + FLOAT32 * parameters * copies
