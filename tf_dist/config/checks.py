"""Options of checks: losses that jump, gradients that are not finite, ranks that differ."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options

option = partial(options.option, group="checks")


@dataclass(frozen=True)
class NumericOptions(options.Options):
    """Loss spikes and non-finite gradients: detection and reaction."""

    on_spike: str = option(
        "off",
        text="on a training-loss spike: nothing, warn, or roll back to an earlier checkpoint and skip the "
        "batches since",
        choices=("off", "warn", "rollback"),
    )
    spike_factor: float = option(
        10.0,
        text="spike threshold: median of the last 64 losses plus this many times their spread",
        least=0,
    )
    spike_skip: int = option(100, text="further batches to skip after a spike", least=0)
    max_bad_steps: int = option(
        10,
        text="consecutive steps skipped for non-finite gradients; the next one ends the run. 0: the first "
        "one does",
        least=0,
        on_resume="free",
    )


@dataclass(frozen=True)
class ConsistencyOptions(options.Options):
    """The consistency check of all ranks' weights and optimizers."""

    check_every: int = option(
        100,
        text="steps between consistency checks of all ranks' weights and optimizers, bit for bit; 0: only in "
        "the first steps",
        least=0,
        on_resume="free",
    )
    on_mismatch: str = option(
        "stop",
        text="when a rank differs: stop, or restore it from the majority",
        choices=("stop", "restore"),
        on_resume="free",
    )
