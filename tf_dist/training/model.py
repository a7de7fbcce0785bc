"""Build the model of a run from a `Config`, and that of one rank on a mesh: whole, or of sharded layers."""

from __future__ import annotations

import contextlib

import keras

from tf_dist.config import Config
from tf_dist.config.fine_tuning import FineTuningOptions
from tf_dist.config.transformer import TransformerOptions
from tf_dist.layers import tensor_parallel
from tf_dist.layers.context_parallel import sequence_parallel
from tf_dist.models import build, row_lstms, row_transformers
from tf_dist.models.body_sizes import BodySizes
from tf_dist.models.fine_tuning import fine_tuned
from tf_dist.models.meta_init import outline
from tf_dist.models.transformer import PLAIN, Layers
from tf_dist.parallel.mesh import Mesh
from tf_dist.tasks.causal_lm import CausalLM
from tf_dist.tasks.registry import task_of


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
        return build_model(config, layers)


def words_of_a_row(config: Config) -> int:
    """W, what the model of a run takes of a row."""
    task = task_of(config)
    return task.layout(config.vocab_size).words if task.of_tables else config.seq_len


def build_model(config: Config, layers: Layers = PLAIN) -> keras.Model:
    """The model of a run's task, with initial weights drawn from ``config.seed``.

    Args:
        config: with the vocabulary of the tokenizer and the number of labels.
        layers: layer types, where ranks partition the model.

    Raises:
        UsageError: a user's function cannot be found, or does not return a suitable model.
    """
    task = task_of(config)
    if task.name == CausalLM.name:
        return build.build(config, layers)
    layout, head = task.layout(config.vocab_size), task.head(config.classes)
    if ":" in config.model:
        return build.users_model(config, layers, layout.words, layout.outputs(head))
    bodies = row_lstms if config.model == "lstm" else row_transformers
    sizes = BodySizes(
        config.layers, config.width, config.heads, config.dropout, config.tie_embeddings,
        config.part(TransformerOptions),
    )  # fmt: skip
    end = build.packed_end(config)
    apart = {} if end is None else {"end_of_text": end}
    with build.reproducible(config):
        model = getattr(bodies, task.architecture.replace("-", "_"))(layout, sizes, head, layers, **apart)
        return fine_tuned(model, config.part(FineTuningOptions), config.seed)
