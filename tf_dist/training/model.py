"""Build the model of one rank from a `Config` and a mesh: whole, or of sharded layers."""

from __future__ import annotations

import contextlib

import keras

from tf_dist.config import Config
from tf_dist.layers import tensor_parallel
from tf_dist.layers.context_parallel import sequence_parallel
from tf_dist.models.build import build
from tf_dist.models.meta_init import outline
from tf_dist.parallel.mesh import Mesh


def model_for(config: Config, mesh: Mesh) -> keras.Model:
    """The model with all layers, sharded along the tensor and sequence axes of the mesh.

    If a rank will not hold all of it, initialization is deferred: a `Trainer` creates the weights it holds.

    Raises:
        UsageError: a user's function cannot be found, or does not return a suitable model.
    """
    layers = sequence_parallel(mesh.sequence, config.seq_len, tensor_parallel(mesh.tensor))
    in_parts = config.pipeline_parallel > 1 or config.chosen_strategy().traits.sharding == 3
    # Not always: a user's function may set weights of its model, which deferred initialization would lose.
    with outline() if in_parts else contextlib.nullcontext():
        return build(config, layers)
