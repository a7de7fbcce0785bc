"""Options of the optimizer and its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from tf_dist import options

option = partial(options.option, group="optimizer")


@dataclass(frozen=True)
class OptimizerOptions(options.Options):
    """The optimizer. Rates per optimizer step."""

    optimizer: str = option(
        "adamw", text="name of a Keras optimizer: adam, adamw, sgd, lion, ...", on_resume="same"
    )
    optimizer_args: dict[str, Any] = option(
        {}, text="extra arguments of the optimizer, as in beta_2=0.99,epsilon=1e-8"
    )
    learning_rate: float = option(1e-3, text="peak learning rate", least=0)
    min_learning_rate: float = option(1e-4, text="final learning rate where it decays", least=0)
    schedule: str = option(
        "cosine",
        text="learning-rate decay after the warm-up",
        choices=("constant", "linear", "cosine", "wsd", "1cycle"),
    )
    decay_share: float = option(
        0.2, text="share of the steps in which schedule wsd decays, at the end", least=0, most=1
    )
    warmup_steps: int = option(20, text="steps of linear warm-up from 0 to the peak", least=0)
    weight_decay: float = option(
        0.1, text="decoupled weight decay of matrices (not of biases and gains)", least=0
    )
    clip_norm: float = option(
        1.0, text="gradient clipping: maximum global norm of the mean gradient; 0: none", least=0
    )
