"""Learning-rate schedules: Keras's own, after a linear warm-up.

With W warm-up steps, S steps, peak p and end e:

    constant   p
    linear     from p to e, evenly
    cosine     e + (p - e) (1 + cos(pi t)) / 2, t from 0 to 1       (Loshchilov & Hutter 2017)
    wsd        p, then evenly down to e over the last share d of the steps (Hu et al. 2024)
    1cycle     cosine from p / 25 up to p over the first 30 %, then cosine down to e (Smith 2018)
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from tf_dist.errors import UsageError

ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START = 25.0


def schedule(
    name: str, steps: int, peak: float, end: float, warmup_steps: int, decay_share: float = 0.2
) -> Any:
    """A schedule for a Keras optimizer, by name: constant, linear, cosine, wsd or 1cycle.

    ``decay_share``: of all steps, those in which wsd decays.

    Raises:
        UsageError: an unknown name.
    """
    # A run shorter than its warm-up (a smoke test) consists of warm-up only.
    warmup_steps = min(warmup_steps, steps)
    falling = max(1, steps - warmup_steps)
    if name == "constant":
        after: Any = peak
    elif name == "linear":
        after = keras.optimizers.schedules.PolynomialDecay(peak, falling, end_learning_rate=end)
    elif name == "cosine":
        after = keras.optimizers.schedules.CosineDecay(peak, falling, alpha=end / peak if peak else 0.0)
    elif name == "wsd":
        after = StableThenDecay(peak, end, falling, max(1, round(steps * decay_share)))
    elif name == "1cycle":
        return OneCycle(peak, end, steps)
    else:
        raise UsageError(f"unknown schedule {name!r}: constant, linear, cosine, wsd or 1cycle")
    return Warmup(after, peak, warmup_steps) if warmup_steps else after


@keras.saving.register_keras_serializable("tf_dist")
class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """``peak * (step + 1) / warmup_steps`` for the first steps, then another schedule from its start.

    Args:
        after: a learning rate or a schedule.
        peak: reached at the end of the warm-up.
        warmup_steps: at least 1.
    """

    def __init__(self, after: Any, peak: float, warmup_steps: int) -> None:
        self.after, self.peak, self.warmup_steps = after, peak, warmup_steps

    def __call__(self, step: Any) -> Any:
        """The learning rate of a step, counted from 0."""
        step = ops.cast(step, "float32")
        rising = self.peak * (step + 1.0) / self.warmup_steps
        later = self.after(step - self.warmup_steps) if callable(self.after) else self.after
        return ops.where(step < self.warmup_steps, rising, later)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "after": keras.saving.serialize_keras_object(self.after),
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Warmup:
        """Create one from `get_config`."""
        return cls(**{**config, "after": keras.saving.deserialize_keras_object(config["after"])})


@keras.saving.register_keras_serializable("tf_dist")
class StableThenDecay(keras.optimizers.schedules.LearningRateSchedule):
    """``peak``, and over the last steps evenly down to ``end``: warm-up, stable, decay (Hu et al. 2024).

    A checkpoint from before the decay can be trained on with more steps, as nothing knew of the end yet.

    Args:
        peak: the learning rate until then.
        end: the learning rate after the last step.
        steps: of the schedule.
        decay_steps: of these, the last ones.
    """

    def __init__(self, peak: float, end: float, steps: int, decay_steps: int) -> None:
        self.peak, self.end, self.steps, self.decay_steps = peak, end, steps, decay_steps

    def __call__(self, step: Any) -> Any:
        """The learning rate of a step, counted from 0."""
        first = float(self.steps - min(self.decay_steps, self.steps))
        share = (ops.cast(step, "float32") - first) / float(min(self.decay_steps, self.steps))
        return self.peak + (self.end - self.peak) * ops.clip(share, 0.0, 1.0)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "peak": self.peak, "end": self.end, "steps": self.steps, "decay_steps": self.decay_steps,
        }  # fmt: skip


@keras.saving.register_keras_serializable("tf_dist")
class OneCycle(keras.optimizers.schedules.LearningRateSchedule):
    """Up to ``peak`` and down to ``end`` along two halves of a cosine (Smith 2018).

    Args:
        peak: the highest learning rate, reached after 30 % of the steps.
        end: the learning rate after the last step.
        steps: length of the cycle.
    """

    def __init__(self, peak: float, end: float, steps: int) -> None:
        self.peak, self.end, self.steps = peak, end, steps

    def __call__(self, step: Any) -> Any:
        """The learning rate of a step, counted from 0."""
        step = ops.cast(step, "float32")
        rise = max(1.0, self.steps * ONE_CYCLE_RISE)
        up = ops.minimum(step / rise, 1.0)
        down = ops.clip((step - rise) / max(1.0, self.steps - rise), 0.0, 1.0)
        rising = _between(self.peak / ONE_CYCLE_START, self.peak, up)
        return ops.where(step < rise, rising, _between(self.peak, self.end, down))

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"peak": self.peak, "end": self.end, "steps": self.steps}


def _between(first: float, last: float, share: Any) -> Any:
    return first + (last - first) * (1.0 - ops.cos(math.pi * share)) / 2.0
