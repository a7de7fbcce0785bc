"""Keras callbacks of a job: metrics, checkpoints, and peer checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras

from tf_dist import faults
from tf_dist.checkpoint.async_writer import SavedCheckpoint
from tf_dist.run.run_folder import RunFolder
from tf_dist.training.train_state import MetricsAccumulator
from tf_dist.training.trainer import Trainer

# Of a validation, besides what begins with val_.
OF_VALIDATION = ("perplexity", "bits_per_byte")
# Saves, and returns what is on disk then.
Save = Callable[[], SavedCheckpoint | None]


def _nothing(row: dict[str, Any]) -> None:
    """No-op callback."""


class LogRun(keras.callbacks.Callback):
    """Writes ``metrics.jsonl``.

    A row covers the steps since the last one: loss is their mean over tokens; step_s, comm_s (moving
    bytes) and wait_s (waiting for slower ranks) are means per step.

    Args:
        trainer: whose steps are logged; its state has the unfinished row.
        run: whose file it is.
        every: steps between rows.
        steps_per_epoch: of the data, for the column ``epoch``.
        tell: called with each row, on every rank.
        show: called with each row on rank 0, in the thread that writes it.
        more: returns further columns after a step.
    """

    def __init__(
        self,
        trainer: Trainer,
        run: RunFolder,
        every: int,
        steps_per_epoch: int,
        tell: Callable[[dict[str, Any]], None] = _nothing,
        show: Callable[[dict[str, Any]], None] = _nothing,
        more: Callable[[int], dict[str, float]] = lambda step: {},
    ) -> None:
        super().__init__()
        self.trainer, self.run, self.every, self.tell, self.show = trainer, run, every, tell, show
        self.more = more
        self.steps_per_epoch = steps_per_epoch
        self._tally = trainer.state.row
        self._row: dict[str, Any] = {}
        self._first_step = trainer.step
        trainer.in_place.when_first.append(self._take_over)
        self._repair()
        self._begin_timing()

    def _begin_timing(self) -> None:
        comm = self.trainer.comm
        self._since = (self.trainer.elapsed_s, comm.comm_s, comm.wait_s)
        self._timed = MetricsAccumulator()  # of this process alone

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Write the row of the last steps: their validation is over."""
        self._write()
        if self._timed.steps == 0:  # excludes the time of validation and saving
            self._begin_timing()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count a step; finish a row if it is due."""
        assert logs is not None
        for tally in (self._tally, self._timed):
            tally.add(logs["loss"], logs["tokens"])
        self._grad_norm = logs["grad_norm"]
        if self.trainer.step % self.every == 0:
            self._finish_row()

    def _finish_row(self) -> None:
        trainer, comm, tally, timed = self.trainer, self.trainer.comm, self._tally, self._timed
        skipped = trainer.state.skipped.total
        elapsed, comm_s, wait_s = (
            now - before
            for now, before in zip((trainer.elapsed_s, comm.comm_s, comm.wait_s), self._since, strict=True)
        )
        self._row = {
            "step": trainer.step,
            "epoch": trainer.step / self.steps_per_epoch,
            "loss": tally.loss_sum / tally.finite if tally.finite else math.nan,
            "learning_rate": _learning_rate(trainer.optimizer, trainer.step - skipped - 1),
            "grad_norm": self._grad_norm,
            "tokens": trainer.tokens,
            "tokens_per_s": timed.tokens / max(elapsed, 1e-9),
            "step_s": elapsed / timed.steps,
            "comm_s": comm_s / timed.steps,
            "wait_s": wait_s / timed.steps,
            "elapsed_s": trainer.elapsed_s,
            "bad_steps": skipped,
            **self.more(trainer.step),
        }
        tally.begin_row()
        self._begin_timing()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add a validation to the row of its step."""
        logs = logs or {}
        if "val_loss" not in logs:
            return
        row = self._row or {"step": self.trainer.step, "epoch": self.trainer.step / self.steps_per_epoch}
        of_validation = {k: v for k, v in logs.items() if k.startswith("val_") or k in OF_VALIDATION}
        self._row = row | of_validation

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Write the last row, also if the run ended between two rows."""
        if self._timed.steps:
            validation, self._row = self._row, {}
            self._finish_row()
            self._row |= {key: value for key, value in validation.items() if key not in self._row}
        self._write()
        self.run.later.drain()

    def _write(self) -> None:
        row, self._row = self._row, {}
        if row:
            self.tell(row)
            self._tally.last = row
            if self.trainer.comm.rank == 0:
                self.run.later(lambda: self._write_now(row))

    def _take_over(self) -> None:
        """Rank 0 has died: repair the file, which may end with half a row."""
        row = self._tally.last
        there = self.run.keep_whole_rows(row.get("step", self._first_step))
        if row and not there:
            self._write_now(row)

    def _repair(self) -> None:
        """After a restart from peer copies, write the last row if rank 0 died before it did."""
        if self._tally.last and self.trainer.comm.rank == 0:
            self._take_over()

    def _write_now(self, row: dict[str, Any]) -> None:
        self.run.log_metrics(row)
        self.show(row)


def _learning_rate(optimizer: keras.optimizers.Optimizer, step: int) -> float:
    """Of a step, counted from 0; `optimizer.learning_rate` is that of the next one."""
    rate = optimizer._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return float(rate(step))
    return float(optimizer.learning_rate)


class SavePeerCheckpoints(keras.callbacks.Callback):
    """Saves a peer checkpoint before the first step, and every N steps.

    Args:
        trainer: whose state it is.
        every: N; 0: never.
        keep: saves it; a collective, called on every rank.
    """

    def __init__(self, trainer: Trainer, every: int, keep: Callable[[], None]) -> None:
        super().__init__()
        self.trainer, self.every, self.keep = trainer, every, keep
        if every:
            trainer.synchronize_every.add(every)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save if it is due."""
        if self.every and self.trainer.step % self.every == 0:
            self.keep()


class SaveRun(keras.callbacks.Callback):
    """Saves a checkpoint every N steps, and at the end.

    A step is saved when the next one begins, so that its validation is over.

    Args:
        trainer: whose state is saved.
        every: N; 0: only at the end.
        save: saves, or begins to; a collective, called on every rank.
        finish: saves, and returns when that is on disk; a collective as well. None: as ``save``.
        poll: called on every rank before each step.
        saved: called on every rank with the result of ``finish``.
        at_once: save before the first step, as the training was resumed from elsewhere.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int,
        save: Save,
        finish: Save | None = None,
        poll: Callable[[], None] | None = None,
        saved: Callable[[SavedCheckpoint | None], None] | None = None,
        at_once: bool = False,
    ) -> None:
        super().__init__()
        self.trainer, self.every, self.save = trainer, every, save
        self.finish, self.poll, self.saved = finish or save, poll, saved
        self._saved_step = -1 if at_once else trainer.step
        self._at_once = at_once
        if every:
            trainer.synchronize_every.add(every)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save the step before this one if it is due."""
        if self.poll is not None:
            self.poll()
        if self._at_once or (self.every and self.trainer.step % self.every == 0):
            self._at_once = False
            self._save(self.save)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Save the last step; it is on disk when this returns."""
        if self._saved_step != self.trainer.step:
            made = self._save(self.finish)
            if self.saved is not None:
                self.saved(made)

    def _save(self, save: Save) -> SavedCheckpoint | None:
        if self._saved_step == self.trainer.step:
            return None
        faults.at("save")
        made: SavedCheckpoint | None = self.trainer.in_place(save)
        self._saved_step = self.trainer.step
        return made
