"""`Fit`: many training steps with what belongs between them: epochs, validations, callbacks, and an end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import keras

from tf_dist.data.tokens import Sequences
from tf_dist.training.callback_list import RankCallbackList

if TYPE_CHECKING:
    from tf_dist.training.trainer import Trainer


class Fit:
    """One call of `Trainer.fit`, whose arguments see there.

    Args:
        trainer: takes the steps.
        sequences: to train on.
        held_out: to validate on after each epoch; None for never.
        steps: optimizer steps in all, counting those before a resume.
        stretch: steps of what Keras calls an epoch.
        validation_bytes: UTF-8 bytes of the held-out text; 0 if not known.
        callbacks: Keras callbacks.
    """

    def __init__(
        self,
        trainer: Trainer,
        sequences: Sequences,
        held_out: Sequences | None,
        *,
        steps: int,
        stretch: int,
        validation_bytes: int = 0,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> None:
        self.trainer, self.sequences, self.held_out = trainer, sequences, held_out
        self.steps, self.stretch, self.validation_bytes = steps, stretch, validation_bytes
        self.sampler = trainer.sampler(sequences)
        self.calls = self._callback_list(callbacks)

    def run(self) -> dict[str, list[float]]:
        """Take the steps; the logs of each epoch, by name."""
        trainer, calls = self.trainer, self.calls
        calls.on_train_begin()
        # Where BackupAndRestore has found an earlier run's epoch, its weights are those of that epoch's end.
        trainer.step = max(trainer.step, (trainer.model._initial_epoch or 0) * self.stretch)
        trainer.last_step = self.steps
        trainer.meets_every.add(self.stretch)
        logs: dict[str, float] = {}
        while trainer.step < self.steps and not trainer.stopped:
            epoch = trainer.step // self.stretch
            calls.on_epoch_begin(epoch)
            logs = self._train_until_end_of(epoch)
            self._verify()
            if self.held_out is not None and not trainer.stopped:
                logs.update(self._validate(self.held_out))
            calls.on_epoch_end(epoch, logs)
            trainer.agree_to_stop()
            self._verify()  # what callbacks have changed is not to be undone later
        trainer.meets_every.discard(self.stretch)
        trainer.last_step = 0
        trainer.in_place(lambda: trainer.sentinel.compare(trainer.step))
        calls.on_train_end(logs)
        trainer.in_place.close()
        return dict(trainer.model.history.history)

    def _train_until_end_of(self, epoch: int) -> dict[str, float]:
        """Train what is left of an epoch's steps; returns the means over these, weighted by tokens."""
        trainer, begin = self.trainer, epoch * self.stretch
        sums, tokens = {"loss": 0.0, "accuracy": 0.0}, 0.0
        while trainer.step < min(self.steps, begin + self.stretch) and not trainer.stopped:
            batch = trainer.step - begin
            self.calls.on_train_batch_begin(batch)
            begun = time.monotonic()
            logs = trainer.train_step(self.sequences, self.sampler)
            trainer.elapsed_s += time.monotonic() - begun
            if math.isfinite(logs["loss"]):  # of a step that was skipped it may be anything
                tokens += logs["tokens"]
                for name in sums:
                    sums[name] += logs[name] * logs["tokens"]
            self.calls.on_train_batch_end(batch, logs)
        trainer.meet()  # callbacks, and what they save, see weights that all ranks have
        sums = trainer.of_all({**sums, "tokens": tokens})
        tokens = max(sums.pop("tokens"), 1.0)
        return {name: value / tokens for name, value in sums.items()}

    def _verify(self) -> None:
        """Where steps may have to be taken again: all that was done up to here is right."""
        trainer = self.trainer
        if trainer.verified.can:
            trainer.in_place(lambda: trainer.sentinel.compare(trainer.step))

    def _validate(self, held_out: Sequences) -> dict[str, float]:
        """Validate as Keras's fit does, with callbacks told."""
        self.calls.on_test_begin()
        found = self.trainer.validate(held_out, self.validation_bytes)
        self.calls.on_test_end({name.removeprefix("val_"): value for name, value in found.items()})
        return found

    def _callback_list(self, callbacks: Sequence[keras.callbacks.Callback]) -> keras.callbacks.CallbackList:
        # What Keras's own callbacks expect to find on a model that is being fitted.
        trainer, model = self.trainer, self.trainer.model
        model.optimizer = trainer.optimizer
        model.stop_training = False
        model._initial_epoch = trainer.step // self.stretch
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
