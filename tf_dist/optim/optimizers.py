"""Build a Keras optimizer with its learning-rate schedule from a `Config`."""

from __future__ import annotations

from typing import Any

import keras

from tf_dist.config import Config
from tf_dist.config.fine_tuning import FineTuningOptions
from tf_dist.errors import UsageError
from tf_dist.models.meta_init import is_deferred
from tf_dist.optim.layer_lr import scale_learning_rates
from tf_dist.optim.lr_schedules import schedule
from tf_dist.optim.muon import Muon
from tf_dist.spelling import did_you_mean


def build(config: Config, model: keras.Model, steps: int) -> keras.optimizers.Optimizer:
    """Create the optimizer that ``config.optimizer`` names; not built: that depends on the rank.

    Matrices decay; biases and the gains of normalization do not, as in GPT-2 and nanoGPT. Factors of the
    learning rate by layer are set on the model's variables (`tf_dist.optim.layer_lr`).

    Args:
        config: optimizer, its arguments, learning rate, schedule and weight decay.
        model: whose trainable variables it will update.
        steps: length of the schedule.

    Raises:
        UsageError: Keras has no such optimizer, or it does not take these arguments.
    """
    rate = schedule(
        config.schedule, steps, config.learning_rate, config.min_learning_rate, config.warmup_steps,
        config.decay_share,
    )  # fmt: skip
    own_flags = {"learning_rate", "weight_decay"} & set(config.optimizer_args)
    if own_flags:
        raise UsageError(f"optimizer_args sets {', '.join(sorted(own_flags))}: use the option of that name")
    # AdamW insists on a number; the others take None for no decay.
    decay = config.weight_decay or (0.0 if config.optimizer.lower() == "adamw" else None)
    arguments = {**config.optimizer_args, "learning_rate": rate, "weight_decay": decay}
    try:
        optimizer = _optimizer_class(config.optimizer)(**arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer {config.optimizer} with {config.optimizer_args}: {error}") from error
    scale_learning_rates(model.weights, config.part(FineTuningOptions))
    if optimizer.weight_decay:
        vectors = [variable for variable in model.trainable_variables if len(variable.shape) < 2]
        if any(map(is_deferred, vectors)):
            # Keras identifies variables by their values: deferred until these exist.
            optimizer.tf_dist_no_decay = lambda: vectors
        else:
            optimizer.exclude_from_weight_decay(var_list=vectors)
    return optimizer


def exclude_vectors(optimizer: Any) -> None:
    """Exclude vectors from weight decay, for a model whose deferred weights have been created since."""
    made = [variable for variable in spared(optimizer) if not is_deferred(variable)]
    if made:
        optimizer.exclude_from_weight_decay(var_list=made)


def spared(optimizer: Any) -> list[Any]:
    """The variables that `build` would exclude from weight decay, if they had values."""
    return list(getattr(optimizer, "tf_dist_no_decay", list)())


def _optimizer_class(name: str) -> Any:
    classes = {
        key.lower(): value
        for key, value in vars(keras.optimizers).items()
        if isinstance(value, type) and issubclass(value, keras.optimizers.Optimizer)
    }
    classes["muon"] = Muon  # Keras's keeps no state that could be divided
    wrappers = ("optimizer", "lossscaleoptimizer")
    known = sorted(key for key in classes if key not in wrappers)
    if name.lower() not in known:
        raise UsageError(
            f"Keras has no optimizer {name!r}: {', '.join(known)}{did_you_mean(name.lower(), known)}"
        )
    return classes[name.lower()]
