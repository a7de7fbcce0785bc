"""Ends a run when validations no longer improve: ``--early-stopping METRIC:PATIENCE``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from tf_dist.errors import UsageError
from tf_dist.metrics.registry import METRICS


class StopEarly(keras.callbacks.Callback):
    """Stops after so many validations in a row without a better one (Prechelt 1998).

    Every rank sees the same logs, so all of them stop after the same step.

    Args:
        metric: its key in ``metrics.jsonl``.
        patience: validations, at least 1.
        before: rows of earlier validations of this run: a resumed run goes on counting.

    Attributes:
        best: the best value so far; None before the first validation.
        waited: validations since then.
    """

    def __init__(self, metric: str, patience: int, before: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self.metric, self.patience = metric, patience
        self._higher = any(one.key == metric and one.higher_is_better for one in METRICS.values())
        self._higher = self._higher or metric == "val_accuracy"
        self.best: float | None = None
        self.waited = 0
        for row in before:
            self._see(row.get(metric))

    @property
    def over(self) -> bool:
        """Whether the run has ended early."""
        return self.waited >= self.patience

    def __str__(self) -> str:
        return f"{self.metric} has not been better than {self.best:.4f} for {self.waited} validations"

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Look at a validation.

        Raises:
            UsageError: on every rank: it has no such metric.
        """
        logs = logs or {}
        if "val_loss" not in logs:
            return
        if self.metric not in logs:
            known = ", ".join(name for name in logs if name.startswith("val_"))
            raise UsageError(f"--early-stopping {self.metric}: validations have {known}")
        self._see(logs[self.metric])
        if self.over:
            self.model.stop_training = True

    def _see(self, value: Any) -> None:
        if not isinstance(value, int | float):
            return
        number = float(value)
        better = self.best is None or (number > self.best if self._higher else number < self.best)
        if better and not math.isnan(number):
            self.best, self.waited = number, 0
        else:
            self.waited += 1
