"""What a job does between steps: metrics and checkpoints, as Keras callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from tf_dist import faults
from tf_dist.training.run import RunFolder
from tf_dist.training.trainer import Trainer


def _nothing(row: dict[str, Any]) -> None:
    """No-op callback."""


@dataclass
class Tally:
    """A row of ``metrics.jsonl`` so far, to be gone on with where a training is; the same on every rank.

    loss_sum: over the ``finite`` tokens of steps whose loss was a number. tokens, steps: of all.
    last: the row before it, once that was given away to be written.
    """

    loss_sum: float = 0.0
    finite: float = 0.0
    tokens: float = 0.0
    steps: int = 0
    last: dict[str, Any] = field(default_factory=dict)

    def add(self, loss: float, tokens: float) -> None:
        """Count a step."""
        if math.isfinite(loss):  # of a step that was skipped it may be anything
            self.loss_sum += loss * tokens
            self.finite += tokens
        self.tokens += tokens
        self.steps += 1

    def begin_row(self) -> None:
        """All that was counted is in a row now."""
        self.loss_sum, self.finite, self.tokens, self.steps = 0.0, 0.0, 0.0, 0

    @property
    def facts(self) -> list[float]:
        """What is kept with a checkpoint."""
        return [self.loss_sum, self.finite, self.tokens, self.steps]

    def go_on_from(self, facts: Sequence[float], last: dict[str, Any] | None = None) -> None:
        """Be what it was when these facts were kept."""
        self.last = dict(last or {})
        self.loss_sum, self.finite, self.tokens = facts[:3]
        self.steps = int(facts[3])


class LogRun(keras.callbacks.Callback):
    """Writes ``metrics.jsonl`` and hands each of its rows on.

    A row covers the steps since the last one: loss is their mean over tokens; step_s, comm_s (moving
    bytes) and wait_s (waiting for slower ranks) are means per step.

    Args:
        trainer: being watched.
        run: where the rows go.
        every: steps between rows.
        steps_per_epoch: of the data, for the column ``epoch``.
        tally: of the row that is under way.
        tell: called with each row at once, on every rank.
        show: called with each row on rank 0, by the thread that writes it.
    """

    def __init__(
        self,
        trainer: Trainer,
        run: RunFolder,
        every: int,
        steps_per_epoch: int,
        tally: Tally | None = None,
        tell: Callable[[dict[str, Any]], None] = _nothing,
        show: Callable[[dict[str, Any]], None] = _nothing,
    ) -> None:
        super().__init__()
        self.trainer, self.run, self.every, self.tell, self.show = trainer, run, every, tell, show
        self.steps_per_epoch = steps_per_epoch
        self._tally = tally or Tally()
        self._row: dict[str, Any] = {}
        self._first_step = trainer.step
        trainer.in_place.when_first.append(self._take_over)
        self._put_right()
        self._begin_timing()

    def _begin_timing(self) -> None:
        comm = self.trainer.comm
        self._since = (self.trainer.elapsed_s, comm.comm_s, comm.wait_s)
        self._timed = Tally()  # of this process alone

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Write the row of the last steps, now that no validation can belong to it."""
        self._write()
        if self._timed.steps == 0:  # not the time that validation or saving took
            self._begin_timing()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count a step; finish a row where one is due."""
        assert logs is not None
        for tally in (self._tally, self._timed):
            tally.add(logs["loss"], logs["tokens"])
        self._grad_norm = logs["grad_norm"]
        if self.trainer.step % self.every == 0:
            self._finish_row()

    def _finish_row(self) -> None:
        trainer, comm, tally, timed = self.trainer, self.trainer.comm, self._tally, self._timed
        elapsed, comm_s, wait_s = (
            now - before
            for now, before in zip((trainer.elapsed_s, comm.comm_s, comm.wait_s), self._since, strict=True)
        )
        self._row = {
            "step": trainer.step,
            "epoch": trainer.step / self.steps_per_epoch,
            "loss": tally.loss_sum / tally.finite if tally.finite else math.nan,
            "learning_rate": _learning_rate(trainer.optimizer, trainer.step - trainer.bad.total - 1),
            "grad_norm": self._grad_norm,
            "tokens": trainer.tokens,
            "tokens_per_s": timed.tokens / max(elapsed, 1e-9),
            "step_s": elapsed / timed.steps,
            "comm_s": comm_s / timed.steps,
            "wait_s": wait_s / timed.steps,
            "elapsed_s": trainer.elapsed_s,
            "bad_steps": trainer.bad.total,
        }
        tally.begin_row()
        self._begin_timing()

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
        """Rank 0 has died: put right what it may have left half written."""
        row = self._tally.last
        there = self.run.keep_whole_rows(row.get("step", self._first_step))
        if row and not there:
            self._write_now(row)

    def _put_right(self) -> None:
        """A training that goes on from copies in memory knows a row that nobody may have written."""
        if self._tally.last and self.trainer.comm.rank == 0:
            self._take_over()

    def _write_now(self, row: dict[str, Any]) -> None:
        self.run.log_metrics(row)
        self.show(row)


def _learning_rate(optimizer: keras.optimizers.Optimizer, step: int) -> float:
    """What a step was taken with, counted from 0; `optimizer.learning_rate` is that of the next one."""
    rate = optimizer._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return float(rate(step))
    return float(optimizer.learning_rate)


class KeepCopies(keras.callbacks.Callback):
    """Has every so many steps, and before the first, what each rank has copied to another one.

    Args:
        trainer: whose state it is.
        every: steps between copies; 0: none.
        keep: does it; a collective, called on every rank.
    """

    def __init__(self, trainer: Trainer, every: int, keep: Callable[[], None]) -> None:
        super().__init__()
        self.trainer, self.every, self.keep = trainer, every, keep
        if every:
            trainer.meets_every.add(every)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Copy, if it is time."""
        if self.every and self.trainer.step % self.every == 0:
            self.keep()


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
        at_once: save before the first step, for where this training goes on from is kept elsewhere.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int,
        save: Callable[[], Any],
        finish: Callable[[], Any] | None = None,
        look: Callable[[], None] | None = None,
        saved: Callable[[Any], None] | None = None,
        at_once: bool = False,
    ) -> None:
        super().__init__()
        self.trainer, self.every, self.save = trainer, every, save
        self.finish, self.look, self.saved = finish or save, look, saved
        self._saved_step = -1 if at_once else trainer.step
        self._at_once = at_once
        if every:
            trainer.meets_every.add(every)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save the step before this one when it is time."""
        if self.look is not None:
            self.look()
        if self._at_once or (self.every and self.trainer.step % self.every == 0):
            self._at_once = False
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
