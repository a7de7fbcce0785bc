"""Learning rate of an asynchronous optimizer, which takes several steps per global batch."""

from __future__ import annotations

from typing import Any

import keras


class AsyncLearningRate:
    """Sets an optimizer's learning rate before each step, by global batch instead of its own step count.

    Args:
        optimizer: built, and not traced yet. Its learning rate, a number or a schedule, gives the rate of a
            global batch; a callback may change a number.
    """

    def __init__(self, optimizer: Any) -> None:
        given = optimizer._learning_rate
        self._schedule = given if isinstance(given, keras.optimizers.schedules.LearningRateSchedule) else None
        self._base = self._set = float(optimizer.learning_rate)
        self._at = -1
        self._variable = keras.Variable(self._base, trainable=False, name="rate_of_a_push")
        # Not through Keras's setter: that would make it a part of the optimizer's state.
        object.__setattr__(optimizer, "_learning_rate", self._variable)

    def __call__(self, step: int, factor: float) -> None:
        """Set the rate of the next optimizer step to ``factor`` times the rate of a global batch."""
        if self._schedule is not None:
            if step != self._at:
                self._base, self._at = float(self._schedule(step)), step
        elif (now := float(self._variable)) != self._set:
            self._base = now
        self._variable.assign(self._base * factor)
        self._set = float(self._variable)
