"""Displays a training: rows of its metrics as plain lines, a bar, or nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras

from tf_dist import progress

# After this many seconds without a line one is printed, if rows of metrics are far apart.
SILENCE_S = 20.0


class ProgressDisplay(Protocol):
    """Displays rows of ``metrics.jsonl``."""

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one row."""

    def step(self, step: int) -> None:
        """Show that a step was taken."""

    def close(self) -> None:
        """Restore the terminal."""


def display(kind: str, steps: int, say: Callable[[str], None]) -> ProgressDisplay:
    """A display of a training.

    Args:
        kind: none; bar, on a rank whose output is shown; or plain.
        steps: of the whole run.
        say: prints a line on rank 0, or on the rank that replaces it after its death.
    """
    if kind == "none":
        return NoProgress()
    return Bar(steps) if kind == "bar" else RowLines(steps, say)


class NoProgress:
    """No display."""

    def __call__(self, row: dict[str, Any]) -> None:
        """No-op."""

    def step(self, step: int) -> None:
        """No-op."""

    def close(self) -> None:
        """No-op."""


class RowLines:
    """Rows as plain lines: they survive ``mpirun``, pipes and log files. They fit a narrow terminal."""

    def __init__(self, steps: int, say: Callable[[str], None]) -> None:
        self.steps, self.say = steps, say
        self._begun, self._first_step = time.monotonic(), -1
        self._said = self._begun

    def __call__(self, row: dict[str, Any]) -> None:
        """Print one row."""
        step, self._said = row["step"], time.monotonic()
        if "loss" in row:
            parts = [
                f"loss {row['loss']:.4f}", f"lr {row['learning_rate']:.2e}", f"grad {row['grad_norm']:.2f}",
                f"{row['tokens_per_s']:>9,.0f} tokens/s", f"step {1e3 * row['step_s']:.0f} ms",
                f"comm {1e3 * row['comm_s']:.1f} ms", f"wait {1e3 * row['wait_s']:.1f} ms",
                f"{self._left(step)} left",
            ]  # fmt: skip
            self._say(step, parts, (2, 4, 1, 5, 6, 3, 7))
        if "val_loss" in row:
            parts = [
                f"validation loss {row['val_loss']:.4f}", f"perplexity {row['perplexity']:.2f}",
                f"accuracy {row['val_accuracy']:.3f}",
            ]  # fmt: skip
            if "bits_per_byte" in row:
                parts.append(f"bits/byte {row['bits_per_byte']:.3f}")
            self._say(step, parts, (3, 2, 1))

    def _say(self, step: int, parts: Sequence[str], dispensable: Sequence[int]) -> None:
        """Print a row, without dispensable columns on a narrow terminal; metrics.jsonl has all."""
        left = list(range(len(parts)))
        for number in dispensable:
            line = f"step {step:>6}/{self.steps}  " + "  ".join(parts[one] for one in left)
            if progress.fits(line):
                break
            left.remove(number)
        self.say(f"step {step:>6}/{self.steps}  " + "  ".join(parts[one] for one in left))

    def step(self, step: int) -> None:
        """Print the progress if rows are far apart."""
        if time.monotonic() - self._said > SILENCE_S:
            self._said = time.monotonic()
            self.say(f"step {step:>6}/{self.steps}  {self._left(step)} left")

    def close(self) -> None:
        """No-op."""

    def _left(self, step: int) -> str:
        now = time.monotonic()
        if self._first_step < 0:
            self._first_step, self._begun = step, now
            return "--:--"
        seconds = (now - self._begun) / max(1, step - self._first_step) * (self.steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Bar:
    """A progress bar with the latest metrics."""

    def __init__(self, steps: int) -> None:
        self._steps, self._parts = steps, {"loss": "training"}
        self._stack = contextlib.ExitStack()
        self._task: progress.ProgressTask | None = None

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one row."""
        if "loss" in row:
            self._parts["loss"] = f"loss {row['loss']:.3f}"
            self._parts["speed"] = f"{row['tokens_per_s']:,.0f} tokens/s"
        if "val_loss" in row:
            self._parts["val"] = f"val {row['val_loss']:.3f}"

    def step(self, step: int) -> None:
        """Advance the bar."""
        if self._task is None:
            self._task = self._stack.enter_context(progress.task("training", self._steps, "steps"))
            self._task.first = step
        self._task.title = "  ".join(self._parts.values())
        self._task.done = step

    def close(self) -> None:
        """Restore the terminal."""
        self._stack.close()
        self._task = None


class ShowSteps(keras.callbacks.Callback):
    """Updates a display at each step, and shows that the first one is being compiled.

    Args:
        show: the display.
        step: returns the number of steps taken.
    """

    def __init__(self, show: ProgressDisplay, step: Callable[[], int]) -> None:
        super().__init__()
        self._show, self._step = show, step
        self._compiling = contextlib.ExitStack()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Show that the first step is being compiled."""
        self._compiling.enter_context(progress.task("compiling the first step"))

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count a step."""
        self._compiling.close()
        self._show.step(self._step())

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """There may have been no step."""
        self._compiling.close()

    def close(self) -> None:
        """Restore the terminal, however the training has ended."""
        self._compiling.close()
        self._show.close()
