"""From a `Config` and a mesh to the model of one rank: whole, or made of layers that ranks share."""

from __future__ import annotations

import contextlib

import keras

from tf_dist.config import Config
from tf_dist.layers import tensor_parallel
from tf_dist.layers.sequence import sequence_parallel
from tf_dist.models.build import build
from tf_dist.models.outline import outline
from tf_dist.parallel.mesh import Mesh


def model_for(config: Config, mesh: Mesh) -> keras.Model:
    """The model of the whole depth, its layers divided along the tensor and sequence axes of the mesh.

    Where a rank will not hold all of it, it is an outline: a `Trainer` makes the weights that it holds.

    Raises:
        UsageError: a user's function cannot be found, or does not return a fitting model.
    """
    layers = sequence_parallel(mesh.sequence, config.seq_len, tensor_parallel(mesh.tensor))
    in_parts = config.pipeline_parallel > 1 or config.chosen_strategy().traits.sharding == 3
    # Not always: a user's function may set weights of its model, which an outline would forget.
    with outline() if in_parts else contextlib.nullcontext():
        return build(config, layers)
