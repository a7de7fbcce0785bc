"""Fine-tuning of a built model: frozen weights and adapters, as a `Config` asks for them."""

from __future__ import annotations

from math import prod

import keras

from tf_dist.config.fine_tuning import FineTuningOptions
from tf_dist.errors import UsageError
from tf_dist.models import freezing, lora
from tf_dist.parallel.sharding import part_of


def fine_tuned(model: keras.Model, options: FineTuningOptions, seed: int) -> keras.Model:
    """Freeze weights and add adapters; returns the model, unchanged without such options.

    Args:
        model: built; weights may be deferred or divided among ranks.
        options: of fine-tuning.
        seed: of the run.

    Raises:
        UsageError: a pattern matches nothing, or nothing is left to train.
    """
    if options.frozen:
        freezing.freeze(model, options.frozen)
    if options.lora_rank:
        lora.add_adapters(model, options.lora_rank, options.lora_alpha, options.lora_targets, seed)
    if options.frozen and not model.trainable_variables:
        raise UsageError(
            f"--freeze {options.frozen!r} freezes all {len(model.weights)} weights of the model: nothing is "
            "left to train. Exclude some, as in --freeze '*,!final_norm', or add adapters (--lora-rank)"
        )
    return model


def trained_parameters(model: keras.Model) -> tuple[int, int]:
    """How many parameters are trained, of how many of the model (over all ranks)."""
    sizes = [(prod(part_of(weight).whole), bool(weight.trainable)) for weight in model.weights]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
