"""Options of fine-tuning: where weights come from, which of them are trained, and how fast."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tf_dist import options
from tf_dist.errors import UsageError

option = partial(options.option, group="fine-tuning", on_resume="same")
Tuned = TypeVar("Tuned", bound=Any)


@dataclass(frozen=True)
class FineTuningOptions(options.Options):
    """Fine-tuning. Patterns are comma-separated, as `tf_dist.models.patterns` reads them."""

    init_from: str = option(
        "",
        text="initial weights by name, for a new training: a run folder, a checkpoint, or a .safetensors, "
        ".weights.h5 or .keras file; a run's tokenizer comes with it",
        metavar="PATH",
        on_resume="told",
    )
    init_except: str = option(
        "",
        text="weights that start anew in spite of --init-from, by pattern",
        metavar="PATTERNS",
        on_resume="told",
    )
    freeze: str = option(
        "",
        text="weights that are not trained, by pattern of layer names and paths, as in "
        "'layer_[01]_*,embedding'; !PATTERN excludes",
        metavar="PATTERNS",
    )
    lora_rank: int = option(
        0,
        text="rank of LoRA adapters beside frozen kernels; 0: none. All else is frozen, or --freeze",
        least=0,
    )
    lora_alpha: float = option(16.0, text="LoRA: adapters are scaled by alpha / rank", least=0)
    lora_targets: str = option(
        "*", text="LoRA: layers that get an adapter, by pattern: dense layers and LSTMs", metavar="PATTERNS"
    )
    layer_lr_decay: float = option(
        1.0,
        text="learning rate of a layer relative to that of the next one, towards the input; the head has 1",
        least=0,
        most=1,
        on_resume="told",
    )
    lr_scale: str = option(
        "",
        text="factors of the learning rate by pattern, as in 'embedding=0.1,final_norm=2'",
        metavar="PATTERN=X,...",
        on_resume="told",
    )

    def check(self) -> None:
        """Refuse factors that are none, and options of what was not asked for."""
        if not self.layer_lr_decay:
            raise UsageError("layer_lr_decay is 0, which trains the head alone: name the others by --freeze")
        self.lr_factors()
        if self.lora_rank and not self.lora_alpha:
            raise UsageError("lora_alpha is 0, which makes every adapter 0; use 16")
        if not self.lora_rank and (self.lora_alpha, self.lora_targets) != (16.0, "*"):
            raise UsageError("lora_alpha and lora_targets are for adapters: give --lora-rank as well")
        if self.init_except and not self.init_from:
            raise UsageError("init_except leaves out weights of --init-from, which is not given")

    def lr_factors(self) -> list[tuple[str, float]]:
        """The pairs of ``lr_scale``: pattern and factor.

        Raises:
            UsageError: a pair without a factor, or a factor that is not positive and finite.
        """
        pairs = []
        for part in filter(None, (word.strip() for word in self.lr_scale.split(","))):
            pattern, _, number = part.rpartition("=")
            try:
                factor = float(number)
            except ValueError:
                factor = 0.0
            if not pattern.strip() or not 0 < factor < float("inf"):
                raise UsageError(
                    f"lr_scale has {part!r}, which is not PATTERN=X with X above 0, as in embedding=0.1. "
                    "Weights that should not change are named by --freeze"
                )
            pairs.append((pattern.strip(), factor))
        return pairs

    @property
    def frozen(self) -> str:
        """The patterns of frozen weights: with LoRA everything, unless ``freeze`` says otherwise."""
        return self.freeze or ("*" if self.lora_rank else "")


def untuned(config: Tuned) -> Tuned:
    """A `Config` without options of fine-tuning: that of the plain model."""
    plain = {field.name: field.default for field in dataclasses.fields(FineTuningOptions)}
    tuned: Tuned = dataclasses.replace(config, **plain)
    return tuned
