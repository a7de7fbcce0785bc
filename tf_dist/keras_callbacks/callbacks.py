"""Callbacks for your own code, public as ``tf_dist.callbacks``.

All of them run on every rank; those that compare or reduce are collectives. They work in plain
``model.fit`` with or without ``tf_dist.distribute``, in `Trainer.fit`, and in a loop that calls Keras's
hooks.
"""

from __future__ import annotations

import time
from typing import Any

import keras
import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.keras_callbacks.metric_reduction import MetricResults, over_ranks, samples_seen
from tf_dist.keras_callbacks.replica_sync import adjustable, broadcast_state, check_same

__all__ = ["AverageMetrics", "BroadcastWeights", "LearningRateWarmup", "SyncCheck", "Throughput"]

Logs = dict[str, Any] | None


class BroadcastWeights(keras.callbacks.Callback):
    """Starts every rank with the weights and the optimizer state of rank 0.

    Args:
        comm: all ranks.

    Raises:
        LaunchError: on every rank, when training begins, if the ranks have different models.
    """

    def __init__(self, comm: Comm) -> None:
        super().__init__()
        self.comm = comm

    def on_train_begin(self, logs: Logs = None) -> None:
        """Broadcast them; a collective."""
        broadcast_state(self.model, self.comm)


class AverageMetrics(keras.callbacks.Callback):
    """Makes the logs of an epoch, and those of its validation, the same on every rank.

    Put it before callbacks that decide by the logs. `metric_reduction` documents what is exact.

    Args:
        comm: all ranks.
    """

    def __init__(self, comm: Comm) -> None:
        super().__init__()
        self.comm = comm
        self._in_fit = False
        self._train: MetricResults | None = None
        self._validation: dict[str, float] = {}

    def on_train_begin(self, logs: Logs = None) -> None:
        """Note that validations are now part of an epoch."""
        self._in_fit = True

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Discard results of the last epoch."""
        self._train, self._validation = None, {}

    def on_test_begin(self, logs: Logs = None) -> None:
        """Save the training results: Keras resets the metrics for validation."""
        if self._in_fit:
            self._train = over_ranks(self.model, self.comm)

    def on_test_end(self, logs: Logs = None) -> None:
        """Replace the results of a validation by global ones; a collective."""
        results = over_ranks(self.model, self.comm)
        logs = {} if logs is None else logs
        logs.update(results.applied_to(logs, self.comm))
        self._validation = {f"val_{name}": value for name, value in logs.items()}

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Replace the logs of an epoch by global ones, in place; a collective."""
        if logs is None:
            return
        train = self._train or over_ranks(self.model, self.comm)
        own = {name: value for name, value in logs.items() if name not in self._validation}
        logs.update(train.applied_to(own, self.comm))
        logs.update({name: value for name, value in self._validation.items() if name in logs})

    def on_train_end(self, logs: Logs = None) -> None:
        """Note that validations are no longer part of an epoch."""
        self._in_fit = False


class LearningRateWarmup(keras.callbacks.Callback):
    """Raises the learning rate linearly, then keeps it (Goyal et al. 2017).

    If each rank brings a batch of its own, R ranks make the batch, and so the learning rate, R times
    as large: by default from the optimizer's rate to R times it. Steps are the optimizer's, so that a
    resumed run continues; one that may resume inside the warm-up should give both ends.

    Args:
        comm: all ranks.
        epochs: length of the warm-up, in epochs; or
        steps: in optimizer steps.
        start: the rate before the first step; None: the optimizer's.
        target: the rate from the last of them on; None: the optimizer's times the number of ranks.

    Raises:
        UsageError: neither or both lengths; when training begins, also if the optimizer follows a schedule,
            or the steps of an epoch are not known.
    """

    def __init__(
        self,
        comm: Comm,
        *,
        epochs: int = 0,
        steps: int = 0,
        start: float | None = None,
        target: float | None = None,
    ) -> None:
        super().__init__()
        if (epochs > 0) == (steps > 0):
            raise UsageError("LearningRateWarmup takes epochs or steps, one of them above 0")
        self.comm, self.epochs, self.steps, self.start, self.target = comm, epochs, steps, start, target
        self._ends: list[tuple[float, float]] = []

    def on_train_begin(self, logs: Logs = None) -> None:
        """Determine both ends, as of rank 0; a collective."""
        optimizers = adjustable(self.model)
        if not optimizers:
            raise UsageError(
                "LearningRateWarmup: the optimizer's learning rate is a schedule, which cannot be set. "
                "Give it a number, or a schedule that warms up itself (such as CosineDecay)"
            )
        rates = self.comm.broadcast_obj([float(optimizer.learning_rate) for optimizer in optimizers])
        self._ends = [
            (
                rate if self.start is None else self.start,
                rate * self.comm.size if self.target is None else self.target,
            )
            for rate in rates
        ]
        self._length = self.steps or self.epochs * self._steps_per_epoch()

    def _steps_per_epoch(self) -> int:
        steps = (self.params or {}).get("steps")
        if not steps:
            raise UsageError("LearningRateWarmup: the steps of an epoch are not known; give steps= instead")
        return int(steps)

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Set the rate of the next step."""
        for optimizer, (start, target) in zip(adjustable(self.model), self._ends, strict=True):
            step = int(optimizer.iterations) + 1
            if step <= self._length:
                optimizer.learning_rate = start + (target - start) * step / self._length


class SyncCheck(keras.callbacks.Callback):
    """Compares weights and optimizer variables of all ranks, bit for bit.

    Args:
        comm: all ranks.
        every: batches between comparisons; 0: only at the end of training.
        with_optimizer: whether the optimizer's variables are compared as well. Not with the Trainer's
            ``strategy="master"``, where only rank 0 keeps them.

    Raises:
        LaunchError: on every rank, naming the ranks and the first variable that differs.
    """

    def __init__(self, comm: Comm, every: int = 100, with_optimizer: bool = True) -> None:
        super().__init__()
        if every < 0:
            raise UsageError(f"SyncCheck: every={every}: at least 0")
        self.comm, self.every, self.with_optimizer = comm, every, with_optimizer
        self._batches = 0

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Compare if it is due; a collective."""
        self._batches += 1
        if self.every and self._batches % self.every == 0:
            self._check(f"after batch {self._batches}")

    def on_train_end(self, logs: Logs = None) -> None:
        """Compare; a collective."""
        self._check(f"at the end, after batch {self._batches},")

    def _check(self, when: str) -> None:
        check_same(self.model, self.comm, when, self.with_optimizer)


class Throughput(keras.callbacks.Callback):
    """Adds ``samples_per_s`` and ``tokens_per_s`` of all ranks to the logs.

    Only time between the begin and the end of batches counts, and not the first batch, which is compiled.
    In `Trainer.fit` tokens are known, and samples if ``tokens_per_sample`` is given.

    Args:
        comm: all ranks.
        tokens_per_sample: tokens of one sample; 0 for no ``tokens_per_s``.
        batch_size: samples of a batch on this rank; 0: as many as Keras's loss metric counts, which
            ``train_on_batch`` resets: set it in a loop of those.
        every: batches between reductions over all ranks; in between, logs repeat the last value.
        smoothing: weight of earlier measurements, from 0 to below 1.
    """

    def __init__(
        self,
        comm: Comm,
        *,
        tokens_per_sample: int = 0,
        batch_size: int = 0,
        every: int = 20,
        smoothing: float = 0.5,
    ) -> None:
        super().__init__()
        if every < 1 or not 0 <= smoothing < 1:
            raise UsageError(f"Throughput: every={every} (at least 1), smoothing={smoothing} (0 to below 1)")
        self.comm, self.tokens_per_sample, self.batch_size = comm, tokens_per_sample, batch_size
        self.every, self.smoothing = every, smoothing

    def on_train_begin(self, logs: Logs = None) -> None:
        """Reset."""
        self._batches = 0
        # samples, tokens, seconds: of this rank since the last reduction, and of all ranks, decaying
        self._mine, self._all = np.zeros(3), np.zeros(3)
        self._rates: dict[str, float] = {}

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Follow Keras, which has reset its counts."""
        self._counted = 0.0

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Count a batch; reduce over the ranks if it is due."""
        elapsed = time.perf_counter() - self._begun
        work = self._work(logs or {})
        self._batches += 1
        if self._batches == 1:
            return
        self._mine += [*work, elapsed]
        if self._batches % self.every == 0:
            self._add_up()
        if logs is not None:
            logs.update(self._rates)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Reduce the remainder; a collective."""
        if self._batches > 1:
            self._add_up()
        if logs is not None:
            logs.update(self._rates)

    def _work(self, logs: dict[str, Any]) -> tuple[float, float]:
        """Samples and tokens of a batch on this rank."""
        if "tokens" in logs:  # set by our Trainer: already global
            tokens = float(logs["tokens"]) / self.comm.size
            return (tokens / self.tokens_per_sample if self.tokens_per_sample else 0.0), tokens
        counted = samples_seen(self.model)
        samples = self.batch_size or counted - self._counted
        self._counted = counted
        return samples, samples * self.tokens_per_sample

    def _add_up(self) -> None:
        self.comm.allreduce(self._mine)
        self._all = self._all * self.smoothing + self._mine
        self._mine = np.zeros(3)
        samples, tokens, of_all_ranks = self._all.tolist()
        seconds = max(of_all_ranks / self.comm.size, 1e-9)
        rates = {"samples_per_s": samples / seconds, "tokens_per_s": tokens / seconds}
        self._rates = {name: rate for name, rate in rates.items() if rate > 0}
