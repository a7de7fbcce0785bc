"""How rows of metrics are shown while training: plain lines, a bar, or nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from tf_dist.comm.base import Comm
from tf_dist.comm.launch import was_launched


class Show(Protocol):
    """Shows rows of ``metrics.jsonl`` to a person."""

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one row."""

    def close(self) -> None:
        """Leave the terminal as it was found."""


def display(progress: str, comm: Comm, steps: int, say: Callable[[str], None]) -> Show:
    """What ``--progress`` asks for; on ranks above 0 nothing that is seen.

    ``auto`` is a bar where one process has a terminal. Under mpirun `isatty` tells nothing: Open MPI gives
    every rank a terminal of its own.
    """
    if progress == "none":
        return Nothing()
    if comm.rank:
        return Lines(steps, say)  # which says nothing, unless rank 0 dies and this one takes its place
    alone = comm.size == 1 and not was_launched(os.environ) and sys.stdout.isatty()
    return Bar(steps) if progress == "bar" or (progress == "auto" and alone) else Lines(steps, say)


class Nothing:
    """Shows nothing."""

    def __call__(self, row: dict[str, Any]) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing is left open."""


class Lines:
    """Rows as plain lines: they survive ``mpirun``, pipes and log files."""

    def __init__(self, steps: int, say: Callable[[str], None]) -> None:
        self.steps, self.say = steps, say
        self._begun, self._first_step = time.monotonic(), -1

    def __call__(self, row: dict[str, Any]) -> None:
        """Say one row."""
        if "loss" in row:
            self.say(
                f"step {row['step']:>6}/{self.steps}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  "
                f"grad {row['grad_norm']:.2f}  {row['tokens_per_s']:>9,.0f} tokens/s  "
                f"step {1e3 * row['step_s']:.0f} ms  comm {1e3 * row['comm_s']:.1f} ms  "
                f"wait {1e3 * row['wait_s']:.1f} ms  {self._left(row['step'])} left"
            )
        if "val_loss" in row:
            bits = f"  bits/byte {row['bits_per_byte']:.3f}" if "bits_per_byte" in row else ""
            self.say(
                f"step {row['step']:>6}/{self.steps}  validation loss {row['val_loss']:.4f}  "
                f"perplexity {row['perplexity']:.2f}  accuracy {row['val_accuracy']:.3f}{bits}"
            )

    def close(self) -> None:
        """Nothing is left open."""

    def _left(self, step: int) -> str:
        now = time.monotonic()
        if self._first_step < 0:
            self._first_step, self._begun = step, now
            return "--:--"
        seconds = (now - self._begun) / max(1, step - self._first_step) * (self.steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Bar:
    """Rows as a bar on a terminal, with `rich`."""

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns)
        self._task = self._progress.add_task("", total=steps)
        self._parts: dict[str, str] = {}
        self._progress.start()

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one row."""
        if "loss" in row:
            self._parts["loss"] = f"loss {row['loss']:.3f}  {row['tokens_per_s']:,.0f} tokens/s"
        if "val_loss" in row:
            self._parts["val"] = f"validation {row['val_loss']:.3f}"
        self._progress.update(self._task, completed=row["step"], description="  ".join(self._parts.values()))

    def close(self) -> None:
        """Leave the terminal as it was found."""
        self._progress.stop()
