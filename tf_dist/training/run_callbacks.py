"""What a job does between steps: metrics and checkpoints, as Keras callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras

from tf_dist import faults
from tf_dist.training.run import RunFolder
from tf_dist.training.trainer import Trainer


def _nothing(row: dict[str, Any]) -> None:
    """Nobody listens."""


class LogRun(keras.callbacks.Callback):
    """Writes ``metrics.jsonl`` and hands each of its rows on.

    A row covers the steps since the last one: loss is their mean over tokens; step_s, comm_s (moving
    bytes) and wait_s (waiting for slower ranks) are means per step.

    Args:
        trainer: being watched.
        run: where the rows go.
        every: steps between rows.
        steps_per_epoch: of the data, for the column ``epoch``.
        tell: called with each row at once, on every rank.
        show: called with each row on rank 0, by the thread that writes it.
    """

    def __init__(
        self,
        trainer: Trainer,
        run: RunFolder,
        every: int,
        steps_per_epoch: int,
        tell: Callable[[dict[str, Any]], None] = _nothing,
        show: Callable[[dict[str, Any]], None] = _nothing,
    ) -> None:
        super().__init__()
        self.trainer, self.run, self.every, self.tell, self.show = trainer, run, every, tell, show
        self.steps_per_epoch = steps_per_epoch
        self._row: dict[str, Any] = {}
        self._handed_on: dict[str, Any] = {}
        self._first_step = trainer.step
        trainer.in_place.when_first.append(self._take_over)
        self._begin_row()

    def _begin_row(self) -> None:
        comm = self.trainer.comm
        self._loss_sum, self._tokens, self._finite, self._steps = 0.0, 0.0, 0.0, 0
        self._since = (self.trainer.elapsed_s, comm.comm_s, comm.wait_s)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Write the row of the last steps, now that no validation can belong to it."""
        self._write()
        if self._steps == 0:  # not the time that validation or saving took
            self._begin_row()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count a step; finish a row where one is due."""
        assert logs is not None
        if math.isfinite(logs["loss"]):  # of a step that was skipped it may be anything
            self._loss_sum += logs["loss"] * logs["tokens"]
            self._finite += logs["tokens"]
        self._tokens += logs["tokens"]
        self._steps += 1
        self._grad_norm = logs["grad_norm"]
        if self.trainer.step % self.every == 0:
            self._finish_row()

    def _finish_row(self) -> None:
        trainer, comm = self.trainer, self.trainer.comm
        elapsed, comm_s, wait_s = (
            now - before
            for now, before in zip((trainer.elapsed_s, comm.comm_s, comm.wait_s), self._since, strict=True)
        )
        self._row = {
            "step": trainer.step,
            "epoch": trainer.step / self.steps_per_epoch,
            "loss": self._loss_sum / self._finite if self._finite else math.nan,
            "learning_rate": _learning_rate(trainer.optimizer, trainer.step - trainer.bad.total - 1),
            "grad_norm": self._grad_norm,
            "tokens": trainer.tokens,
            "tokens_per_s": self._tokens / max(elapsed, 1e-9),
            "step_s": elapsed / self._steps,
            "comm_s": comm_s / self._steps,
            "wait_s": wait_s / self._steps,
            "elapsed_s": trainer.elapsed_s,
            "bad_steps": trainer.bad.total,
        }
        self._begin_row()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add a validation to the row of its step."""
        logs = logs or {}
        if "val_loss" not in logs:
            return
        row = self._row or {"step": self.trainer.step, "epoch": self.trainer.step / self.steps_per_epoch}
        keys = ("val_loss", "perplexity", "bits_per_byte", "val_accuracy")
        self._row = row | {key: logs[key] for key in keys if key in logs}

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Write the last row, also where the run ended between two of them."""
        if self._steps:
            validation, self._row = self._row, {}
            self._finish_row()
            self._row |= {key: value for key, value in validation.items() if key not in self._row}
        self._write()
        self.run.later.drain()

    def _write(self) -> None:
        row, self._row = self._row, {}
        if row:
            self.tell(row)
            self._handed_on = row
            if self.trainer.comm.rank == 0:
                self.run.later(lambda: self._write_now(row))

    def _take_over(self) -> None:
        """Rank 0 has died: put right what it may have left half written."""
        row = self._handed_on
        there = self.run.keep_whole_rows(row.get("step", self._first_step))
        if row and not there:
            self._write_now(row)

    def _write_now(self, row: dict[str, Any]) -> None:
        self.run.log_metrics(row)
        self.show(row)


def _learning_rate(optimizer: keras.optimizers.Optimizer, step: int) -> float:
    """What a step was taken with, counted from 0; `optimizer.learning_rate` is that of the next one."""
    rate = optimizer._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return float(rate(step))
    return float(optimizer.learning_rate)


class SaveRun(keras.callbacks.Callback):
    """Saves a checkpoint every so many steps, and at the end.

    A step is saved when the next one begins, so that its validation is over.

    Args:
        trainer: whose state is saved.
        every: steps between checkpoints; 0 for the end only.
        save: saves, or begins to; a collective, called on every rank.
        finish: saves, and returns when that is on the disk; a collective as well. None: as ``save``.
        look: called on every rank before each step.
        saved: called on every rank with what ``finish`` returned.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int,
        save: Callable[[], Any],
        finish: Callable[[], Any] | None = None,
        look: Callable[[], None] | None = None,
        saved: Callable[[Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.trainer, self.every, self.save = trainer, every, save
        self.finish, self.look, self.saved = finish or save, look, saved
        self._saved_step = trainer.step
        if every:
            trainer.meets_every.add(every)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save the step before this one when it is time."""
        if self.look is not None:
            self.look()
        if self.every and self.trainer.step % self.every == 0:
            self._save(self.save)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Save the end, which is on the disk when this returns."""
        if self._saved_step != self.trainer.step:
            made = self._save(self.finish)
            if self.saved is not None:
                self.saved(made)

    def _save(self, save: Callable[[], Any]) -> Any:
        if self._saved_step == self.trainer.step:
            return None
        faults.at("save")
        made = self.trainer.in_place(save)
        self._saved_step = self.trainer.step
        return made
