"""`TrainingLoop`: what surrounds training steps: epochs, validation, callbacks and the end of training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import keras

from tf_dist.comm.transport.base import Comm
from tf_dist.data.rows import Rows
from tf_dist.data.sampler import Sampler
from tf_dist.keras_callbacks.callback_list import RankCallbackList
from tf_dist.strategies.base import Strategy
from tf_dist.training.in_place_recovery import InPlaceRecovery
from tf_dist.training.replay import Replay
from tf_dist.training.train_state import TrainState


class Steps(Protocol):
    """What the loop needs of a `tf_dist.training.trainer.Trainer`."""

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    comm: Comm
    strategy: Strategy
    state: TrainState
    in_place: InPlaceRecovery
    replay: Replay
    last_step: int
    synchronize_every: set[int]

    def sampler(self, sequences: Rows) -> Sampler:
        """The order of the data."""

    def validate(self, held_out: Rows, text_bytes: int) -> dict[str, float]:
        """Loss over held-out tokens."""

    def synchronize(self) -> None:
        """Make all replicas continue from the same weights."""

    def of_all(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums over steps, of all ranks."""

    def compare(self) -> None:
        """Run the consistency check now."""

    def agree_to_stop(self) -> None:
        """Agree on whether any rank wants to stop."""


class TrainingLoop:
    """Epochs and batches of one call of `Trainer.fit`, with all that happens between training steps.

    Args:
        trainer: takes the steps.
        sequences: to train on.
        held_out: to validate on after each epoch; None for never.
        steps: optimizer steps in all, counting those before a resume.
        stretch: steps of what Keras calls an epoch.
        validation_bytes: UTF-8 bytes of the held-out text; 0 if not known.
        callbacks: Keras callbacks.

    Attributes:
        sampler: order of the data.
        history: the logs of each epoch, by name, after the last one.
    """

    def __init__(
        self,
        trainer: Steps,
        sequences: Rows,
        held_out: Rows | None,
        *,
        steps: int,
        stretch: int,
        validation_bytes: int = 0,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> None:
        self.trainer, self.sequences, self.held_out = trainer, sequences, held_out
        self.steps, self.stretch, self.validation_bytes = steps, stretch, validation_bytes
        self.sampler = trainer.sampler(sequences)
        self.history: dict[str, list[float]] = {}
        self.calls = self._callback_list(callbacks)
        self._logs: dict[str, float] = {}
        self._sums, self._tokens = {"loss": 0.0, "accuracy": 0.0}, 0.0

    def epochs(self) -> Iterator[int]:
        """The remaining epochs, each followed by validation and callbacks; the caller takes the `batches`."""
        trainer, calls, state = self.trainer, self.calls, self.trainer.state
        calls.on_train_begin()
        # If BackupAndRestore has found an earlier run's epoch, its weights are those of that epoch's end.
        state.step = max(state.step, (trainer.model._initial_epoch or 0) * self.stretch)
        trainer.last_step = self.steps
        trainer.synchronize_every.add(self.stretch)
        logs: dict[str, float] = {}
        while state.step < self.steps and not state.stopped:
            epoch = state.step // self.stretch
            calls.on_epoch_begin(epoch)
            yield epoch
            logs = self._epoch_logs()
            self._verify()
            if self.held_out is not None and not state.stopped:
                logs.update(self._validate(self.held_out))
            calls.on_epoch_end(epoch, logs)
            trainer.agree_to_stop()
            self._verify()  # what callbacks have changed is not to be undone later
        trainer.synchronize_every.discard(self.stretch)
        trainer.last_step = 0
        trainer.compare()
        calls.on_train_end(logs)
        trainer.in_place.close()
        self.history = dict(trainer.model.history.history)

    def batches(self, epoch: int) -> Iterator[int]:
        """The remaining steps of an epoch, each between its callbacks; the caller takes and `add`s each."""
        state, begin = self.trainer.state, epoch * self.stretch
        while state.step < min(self.steps, begin + self.stretch) and not state.stopped:
            batch = state.step - begin
            self.calls.on_train_batch_begin(batch)
            begun = time.monotonic()
            yield batch
            state.elapsed_s += time.monotonic() - begun
            self.calls.on_train_batch_end(batch, self._logs)

    def add(self, logs: dict[str, float]) -> None:
        """Add the logs of a step to the means of its epoch, which are weighted by tokens."""
        self._logs, sums = logs, self._sums
        if math.isfinite(logs["loss"]):  # of a skipped step it may be anything
            self._tokens += logs["tokens"]
            for name in sums:
                sums[name] += logs[name] * logs["tokens"]

    def _epoch_logs(self) -> dict[str, float]:
        """Means over the steps of an epoch, of all ranks; a collective."""
        self.trainer.synchronize()  # callbacks, and what they save, see weights that all ranks have
        sums = self.trainer.of_all({**self._sums, "tokens": self._tokens})
        self._sums, self._tokens = {"loss": 0.0, "accuracy": 0.0}, 0.0
        tokens = max(sums.pop("tokens"), 1.0)
        return {name: value / tokens for name, value in sums.items()}

    def _verify(self) -> None:
        """Verify the present state if steps may be replayed: none before it will be."""
        if self.trainer.replay.can:
            self.trainer.compare()

    def _validate(self, held_out: Rows) -> dict[str, float]:
        """Validate as Keras's fit does, with its callbacks."""
        self.calls.on_test_begin()
        found = self.trainer.validate(held_out, self.validation_bytes)
        self.calls.on_test_end({name.removeprefix("val_"): value for name, value in found.items()})
        return found

    def _callback_list(self, callbacks: Sequence[keras.callbacks.Callback]) -> keras.callbacks.CallbackList:
        # What Keras's own callbacks expect to find on a model that is being fitted.
        trainer, model = self.trainer, self.trainer.model
        model.optimizer = trainer.optimizer
        model.stop_training = False
        model._initial_epoch = trainer.state.step // self.stretch
        return RankCallbackList(
            list(callbacks),
            add_history=True,
            model=model,
            comm=trainer.comm,
            lone_optimizer=trainer.strategy.traits.optimizer_on_root,
            lockstep=trainer.strategy.traits.lockstep,
            together=trainer.in_place,
            epochs=math.ceil(self.steps / self.stretch),
            steps=self.stretch,
            verbose=1,  # for a ProgbarLogger among the callbacks; none is added
        )
