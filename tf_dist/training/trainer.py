"""The `Trainer`: `fit` is the training loop, and `train_step` one step of distributed training.

Legend: G global rows, B rows of a micro-batch, T tokens, P parameters, R ranks.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from tf_dist import faults
from tf_dist.checkpoint.sharded_state import ShardedState, sha256
from tf_dist.comm.formatting import counted, named
from tf_dist.comm.runtime.backend_self_test import prove
from tf_dist.comm.runtime.communicators import as_comm
from tf_dist.comm.runtime.kernel_settings import same_environment
from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.transport.base import Comm
from tf_dist.config import Config
from tf_dist.config.pipeline import PipelineOptions
from tf_dist.data.mixture import sampler_of
from tf_dist.data.rows import Rows
from tf_dist.data.sampler import Sampler
from tf_dist.data.tokens import Sequences
from tf_dist.errors import DataError, RankLost
from tf_dist.models.model_outputs import FRAMES, outputs_of
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.totals import CORRECT, LOSS, STOP, TOKENS, Totals
from tf_dist.runners.moving_statistics import MovingStatistics
from tf_dist.runners.runner import ModelRunner
from tf_dist.strategies.base import StepRequest, Strategy
from tf_dist.strategies.registry import facts_of, strategy_of
from tf_dist.training.build import RunnerOptions, arrange, rebuilt
from tf_dist.training.consistency_check import ConsistencyCheck
from tf_dist.training.consistency_groups import replicated_groups
from tf_dist.training.evaluation import validated
from tf_dist.training.guards import StepGuard, StepResult, Verdict
from tf_dist.training.in_place_recovery import InPlaceRecovery
from tf_dist.training.loop import TrainingLoop
from tf_dist.training.loss_spikes import LossSpikes
from tf_dist.training.micro_batch_feed import MicroBatchFeed
from tf_dist.training.nonfinite_gradients import NonFiniteGradients
from tf_dist.training.preflight import (
    agree_on_data,
    agree_on_model,
    agree_on_options,
    broadcast_initial_weights,
    compare_gradients,
    find_moving_statistics,
    give,
    refuse_distributed,
    refuse_probabilities,
    report_fallback,
    warn_of_foreign_loss,
    warn_of_random_draws,
)
from tf_dist.training.replay import Replay
from tf_dist.training.strategy_state import remembered, survived
from tf_dist.training.token_ids import check_token_ids, ids_of_this_model
from tf_dist.training.train_state import TrainState
from tf_dist.training.trainer_options import check_counts, flat_options, micro_batch_rows, pipeline_of, plain
from tf_dist.training.xla_autotune import XlaAutotune

LOG = logging.getLogger(__name__)
# Arguments of a Trainer that are compared in other ways.
NOT_OPTIONS = (
    "self", "model", "optimizer", "comm", "mesh", "spikes",
    "strategy", "update",
)  # fmt: skip


class Trainer:
    """Trains a Keras language model over all ranks of a `Comm`.

    A global batch of G rows is a list of G / B micro-batches, assigned to the ranks in contiguous blocks, so
    any number of ranks sees the same batches.

    Args:
        model: token ids (B, T) int32 -> logits (B, T, V).
            All ranks start from rank 0's weights, trainable or not; only rank 0 need have built or loaded it.
        optimizer: any Keras optimizer, not yet distributed in any way.
        comm: all ranks, from ``tf_dist.connect()``; or an mpi4py communicator, also of a subset of the ranks.
        strategy: how gradients become new weights: one of `tf_dist.strategies` as in
            ``DiLoCo(outer_lr=0.7)``, its name, or ``package.module:Class`` of your own. All ranks have the
            same weights with "allreduce", "master" and "zero"; with "local-sgd", "diloco", "downpour",
            "easgd" and "gossip" each has its own until they synchronize.
        global_batch_size: G, sequences in one optimizer step.
        micro_batch_size: B, sequences in one forward and backward pass; must divide G.
            0 or None: a quarter of G, or the next smaller divisor.
        seq_len: T; None: that of the model's input, else 64.
        clip_norm: largest global norm of the mean gradient; 0: no clipping here, the optimizer may clip.
        seed: of the data order and of dropout.
        check_every: steps between runs of the `ConsistencyCheck`; 0: only in the first steps.
        on_mismatch: "stop" when a rank differs, or "restore" it from a majority of the others.
        allreduce: transport of gradient sums: "window", "messages", or "auto", the faster one.
        autotune: what is timed before the first step: "exact": nothing that changes bits, "full": also XLA,
            or "off".
        xla: whether XLA compiles forward and backward, "on" or "off"; "auto": as in the checkpoint that is
            restored, else as autotune decides.
        overlap: reduce gradients during the backward pass: "auto", if ranks span nodes, "on", "off".
        chunk_bytes: chunk size of sums between ranks; 0: the fastest.
        mesh: device mesh; None: data parallelism only, with the whole model on every rank.
        pipeline: `tf_dist.config.pipeline.PipelineOptions`, or some of them by name.
        zero_stage: of the strategy name "zero": 1 shards optimizer state, 2 also gradients, 3 also weights.
        local: options of a strategy given by name, by the names of their flags.
        asynchrony: the same.
        compression: of gradients, by the names of the flags, as in ``{"compression": "powersgd"}``.
        update: an older name of ``strategy``.
        min_ranks: if the run survives failed ranks (`InPlaceRecovery`): with fewer ranks it ends.
        max_bad_steps: consecutive steps skipped for a non-finite gradient (`NonFiniteGradients`).
        spikes: detects loss spikes, and knows which batches are skipped; None: no detection, none skipped.

    Attributes:
        state: position and counters of the training; `step`, `tokens` and others are read from it.
        guards: inspect each step, in this order.
        nonfinite_gradients: counts steps that were skipped.
        consistency_check: compares the ranks.
        replay: repeats the steps after the last verified state.
        in_place: runs phases in spite of failed ranks, if that is possible.
        tuning: whether XLA compiles forward and backward, and why.
        synchronize_every: after multiples of these steps the model of all ranks is evaluated or saved.
        last_step: of the current `fit`.
        metrics: called in each validation, on every rank, with runner, mesh, B and held-out rows; what they
            return, the same on all ranks, is added to its logs.

    Raises:
        UsageError: sizes that do not fit, an unknown strategy, or a distributed optimizer.
        LaunchError: on every rank, naming what differs: options, models or optimizers.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        comm: Comm | Any,
        strategy: Strategy | str = Config.strategy,
        *,
        global_batch_size: int = Config.global_batch_size,
        micro_batch_size: int | None = Config.micro_batch_size,
        seq_len: int | None = None,
        clip_norm: float = 0.0,
        seed: int = Config.seed,
        check_every: int = Config.check_every,
        on_mismatch: str = Config.on_mismatch,
        allreduce: str = Config.allreduce,
        autotune: str = Config.autotune,
        xla: str = Config.xla,
        overlap: str = Config.overlap,
        chunk_bytes: int = Config.chunk_bytes,
        mesh: Mesh | None = None,
        zero_stage: int = Config.zero_stage,
        pipeline: PipelineOptions | Mapping[str, Any] | None = None,
        local: Mapping[str, Any] | None = None,
        compression: Mapping[str, Any] | None = None,
        asynchrony: Mapping[str, Any] | None = None,
        min_ranks: int = Config.min_ranks,
        max_bad_steps: int = Config.max_bad_steps,
        spikes: LossSpikes | None = None,
        update: Strategy | str | None = None,
    ) -> None:
        given = {name: plain(value) for name, value in locals().items() if name not in NOT_OPTIONS}
        wanted = strategy if update is None else update
        refuse_distributed(optimizer)
        self.comm = comm = as_comm(comm)
        self.mesh = mesh or Mesh(comm)
        self.spikes = spikes or LossSpikes()
        # With context parallelism a rank's model takes a part of each row.
        self.seq_len = seq_len or (_static_seq_len(model) or Config.seq_len) * self.mesh.sequence.size
        more = {"seq_len": self.seq_len, "mesh": self.mesh.shape, "spikes": self.spikes.options}
        agree_on_options(comm, {**given, **more, **facts_of(wanted)})
        self.strategy = strategy_of(wanted, flat_options(zero_stage, local, asynchrony, compression))
        self.rows = micro_batch_rows(global_batch_size, micro_batch_size)
        self.model, self.optimizer = model, optimizer
        self.global_batch_size, self.clip_norm, self.seed = global_batch_size, clip_norm, seed
        self.micro_batches = global_batch_size // self.rows
        self.runner_options = RunnerOptions(
            allreduce, chunk_bytes, autotune != "off", overlap, pipeline_of(pipeline)
        )
        sizes = (self.rows, self.seq_len, seed, self.micro_batches)
        self._prepare_model()
        self.arrangement = arrange(model, optimizer, self.mesh, *sizes, self.strategy, self.runner_options)
        self.replica, self.runner = self.arrangement.replica, self.arrangement.runner
        self.my_micro_batches = self.arrangement.micro_batches
        self.tuning = XlaAutotune(self.replica, comm, autotune, xla, self.arrangement.no_xla)
        self.state = TrainState(spikes=self.spikes.seen)
        self._feed = MicroBatchFeed(self.state, self.rows, self.my_micro_batches)
        self.last_step, self.synchronize_every = 0, set[int]()
        self.metrics: list[Callable[[ModelRunner, Mesh, int, Rows], dict[str, float]]] = []
        self._make_guards(check_every, on_mismatch, min_ranks, max_bad_steps)
        model.stop_training = False

    def _make_guards(self, check_every: int, on_mismatch: str, min_ranks: int, max_bad_steps: int) -> None:
        """Make the guards and the recovery: they see state, ranks and what these hold, not the Trainer."""
        self._whole: ShardedState | None = None
        self._moved: list[np.ndarray] | None = None
        self._stop_requested = self._begun = False
        state, comm, traits, plain = self.state, self.comm, self.strategy.traits, self.mesh.plain
        groups = replicated_groups(self.model, self.replica, self.mesh, self.strategy)
        can_replay = plain and traits.atomic_step and on_mismatch == "restore"
        self.replay = Replay(state, self.whole, self.attempt_step, can_replay)
        self.consistency_check = ConsistencyCheck(
            comm, groups, check_every, on_mismatch, in_sync=lambda: self.strategy.in_sync, replay=self.replay
        )
        alone = plain and traits.survives_failures
        self.in_place = InPlaceRecovery(state, comm, self.whole, self.redistribute, alone, min_ranks)
        most = max_bad_steps if traits.atomic_step else min(max_bad_steps, 0)
        self.nonfinite_gradients = NonFiniteGradients(comm, self.replica, self.whole, most)
        self.spikes.comm = comm
        self.guards: list[StepGuard] = [self.consistency_check, self.nonfinite_gradients]
        if traits.global_losses:
            self.guards.append(self.spikes)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self.state.step

    @property
    def tokens(self) -> int:
        """Target tokens trained on so far."""
        return self.state.tokens

    @property
    def elapsed_s(self) -> float:
        """Seconds spent in training, over all resumed runs."""
        return self.state.elapsed_s

    @property
    def stopped(self) -> bool:
        """Whether the ranks have agreed to stop."""
        return self.state.stopped

    @property
    def lost(self) -> list[int]:
        """Failed ranks, as numbered when the job began."""
        return self.state.lost

    @property
    def when_lost(self) -> list[Callable[[], None]]:
        """Called on every surviving rank, after each failure."""
        return self.in_place.when_lost

    def _prepare_model(self) -> None:
        """Give all ranks the same built model, before the optimizer creates its state; a collective."""
        if not self.model.built:
            self.model(np.zeros((1, self.seq_len // self.mesh.sequence.size), np.int32))
        agree_on_model(self.model, self.optimizer, self.mesh)
        broadcast_initial_weights(self.model, self.mesh)

    @property
    def _alike(self) -> bool:
        """Whether all ranks do the same work per micro-batch, so that their pace can be compared."""
        traits = self.strategy.traits
        return self.mesh.plain and traits.lockstep and not traits.optimizer_on_root

    # One step ------------------------------------------------------------------------------------

    def train_step(self, sequences: Rows, sampler: Sampler) -> dict[str, float]:
        """Take one optimizer step on one global batch, over all ranks.

        Returns:
            loss (mean nats per token), accuracy, grad_norm and tokens: the same on every rank; local with a
            strategy without `global_losses`. If grad_norm is not finite, no weight has changed.

        Raises:
            NumericError: on every rank: too many consecutive non-finite gradients, or non-finite weights.
            Spike: on every rank: the loss has jumped, and ``spikes`` is to roll back.
        """
        if not self._begun:
            self._begin(sequences, None, {})
        self._data, begins = (sequences, sampler), True
        self.comm.record.begin_step(self.step + 1)
        with ids_of_this_model(), self.in_place.phase() as phase:
            while not phase.done:
                try:
                    if begins:
                        self._before_step()
                    request = self._request()
                    norm = float(self.strategy.step(request))  # ranks exchange gradients, and update weights
                    begins = False
                    if self._after_step(request, norm) is Verdict.OK:
                        phase.finish(self._count(request, norm))
                except RankLost as error:
                    begins = True
                    phase.recover(error)
        self.comm.record.end_step(len(self.my_micro_batches) * self._alike)
        logs: dict[str, float] = dict(phase.result)
        for guard in self.guards:
            guard.settle(self.state, logs)
        return logs

    def attempt_step(self) -> None:
        """Take the next step inside of a phase, on the data of the last `train_step`: for `Replay`."""
        verdict = Verdict.RETRY
        while verdict is Verdict.RETRY:
            request = self._request()
            norm = float(self.strategy.step(request))
            verdict = self._after_step(request, norm)
        self._count(request, norm)

    def _before_step(self) -> None:
        faults.begin(self.step + 1, self.replica.variables)
        for guard in self.guards:
            guard.before(self.state)

    def _request(self) -> StepRequest:
        """The arguments of the next step."""
        faults.at("forward", self.step + 1)
        totals = Totals(self.micro_batches)
        if (self._stop_requested or self.model.stop_training) and self.strategy.traits.global_losses:
            totals.ask_to_stop()
        self._moved = None
        return StepRequest(
            self.step, self._next_synchronization(), partial(self._gradients, totals),
            partial(self._feed.make, *self._data), self.arrangement.order, totals, self.clip_norm,
            self.replica, self.mesh,
        )  # fmt: skip

    def _gradients(self, totals: Totals) -> list[np.ndarray]:
        """The terms of this rank in the sum of gradients, (P,) each."""
        self.runner.forward_backward(self.step, self._feed.next(*self._data), totals)
        terms = self.runner.gradients()
        faults.at("gradient")
        faults.inject_nan(terms)
        self._moved = self._moving.reduce(self.comm, self.micro_batches)
        return terms

    @property
    def _moving(self) -> MovingStatistics:
        found: MovingStatistics = getattr(self.replica, "moving", MovingStatistics())
        return found

    def _after_step(self, request: StepRequest, norm: float) -> Verdict:
        """Let the guards inspect the step of a request, whose gradient had this norm."""
        finite = math.isfinite(norm)
        if self._moved is not None and finite:
            self._moving.move(self._moved)
        taken = finite or not self.strategy.traits.lockstep
        batches = partial(self._feed.next, *self._data)
        result = StepResult(norm, taken, request.totals, self.runner, batches)
        retry = any(guard.after(self.state, result) is Verdict.RETRY for guard in self.guards)
        return Verdict.RETRY if retry else Verdict.OK

    def _count(self, request: StepRequest, norm: float) -> dict[str, float]:
        """Count the step of a request; its logs."""
        counts = request.totals.sum()
        self.state.step += 1
        self.state.tokens += int(counts[TOKENS])
        self.state.stopped = bool(counts[STOP])  # any rank's wish, agreed on by the reduction itself
        count = max(counts[TOKENS], 1.0)
        return {
            "loss": float(counts[LOSS] / count),
            "accuracy": float(counts[CORRECT] / count),
            "grad_norm": norm,
            "tokens": float(counts[TOKENS]),
        }

    def _next_synchronization(self) -> int:
        """The next step before which the model of all ranks is evaluated or saved."""
        regular = [self.step // every * every + every for every in self.synchronize_every]
        return min([max(self.last_step, self.step + 1), *regular])

    # Many steps ----------------------------------------------------------------------------------

    def fit(
        self,
        tokens: np.ndarray | Rows,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        validation: np.ndarray | Rows | None = None,
        validation_bytes: int = 0,
        eval_every: int = 0,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> dict[str, list[float]]:
        """Train for ``steps`` optimizer steps.

        Steps are counted from the end of the last `fit`, as in Keras: a second one trains as much again. If
        training was restored, or an error has left a `fit`, earlier steps count as well.

        Callbacks follow Keras's protocol with the same values on every rank; those that write files run on
        rank 0 only. A Keras "epoch" is the stretch from one validation to the next, or a pass over the data
        if ``eval_every`` is 0; a batch is an optimizer step, counted from the beginning of its epoch.

        Args:
            tokens: 1-D token ids, `Sequences` of them, or other `tf_dist.data.rows.Rows`.
            steps: optimizer steps, 1 or more; None: as many as ``epochs`` take.
            epochs: passes over the data; None: one.
            validation: held-out tokens; all of them are used, distributed among the ranks.
            validation_bytes: UTF-8 bytes of their text, for bits per byte; 0 if unknown.
            eval_every: steps between validations; 0 for never.
            callbacks: Keras callbacks.

        Returns:
            The logs of each epoch of this `fit`, by name, as Keras's ``History.history``. Empty, with a
            warning, if a run was restored that has taken all these steps.

        Raises:
            UsageError: fewer than one step; a model that ends in softmax.
            DataError: fewer sequences than one global batch, or a token id outside the vocabulary.
            NumericError: gradients were not finite, see ``max_bad_steps``.
            LaunchError: the ranks do not communicate, or their data, arguments, weights or optimizers differ.
        """
        loop = self._loop(tokens, steps, epochs, validation, validation_bytes, eval_every, callbacks)
        for epoch in loop.epochs():
            for _ in loop.batches(epoch):
                loop.add(self.train_step(loop.sequences, loop.sampler))
        self.replica.optimizer_step.give_back()
        self._stop_requested, self.state.fitted = False, self.step
        return loop.history

    def _loop(
        self,
        tokens: np.ndarray | Rows,
        steps: int | None,
        epochs: int | None,
        validation: np.ndarray | Rows | None,
        validation_bytes: int,
        eval_every: int,
        callbacks: Sequence[keras.callbacks.Callback],
    ) -> TrainingLoop:
        """The loop of a `fit`, whose arguments these are, checked on all ranks; a collective."""
        check_counts(steps, epochs, eval_every)
        sequences = self.sequences(tokens)
        held_out = None if validation is None else self.sequences(validation)
        check_token_ids(self.model, self.mesh, self.comm, self.seq_len, sequences, held_out)
        self.state.stopped, whole = False, self.sampler(sequences).steps_per_epoch
        loop = TrainingLoop(
            self,
            sequences,
            held_out if eval_every else None,
            steps=self.state.fitted + ((epochs or 1) * whole if steps is None else steps),
            stretch=eval_every or whole,
            validation_bytes=validation_bytes,
            callbacks=callbacks,
        )
        options = {"steps": steps, "epochs": epochs, "eval_every": eval_every, "bytes": validation_bytes}
        self._begin(sequences, held_out, options)
        if loop.steps <= self.step and self.comm.rank == 0:
            warnings.warn(f"step {self.step} is reached already: nothing is trained", stacklevel=3)
        return loop

    def _begin(self, sequences: Rows, held_out: Rows | None, options: Mapping[str, Any]) -> None:
        """Run the checks before the first step (`tf_dist.training.preflight`); a collective."""
        prove(self.comm)
        same_environment(self.comm)
        position = {"step": self.step, "counted from": self.state.fitted, "seq_len": self.seq_len}
        agree_on_data(self.comm, sequences, held_out, {**position, **options})
        self.broadcast_weights()
        if not self._begun:
            find_moving_statistics(self.model, self.replica, self.strategy, self.mesh)
        self.tune()
        if not self._begun:
            with ids_of_this_model():
                refuse_probabilities(self.model, self.replica, self.runner, self.mesh, sequences)
                (batch,) = self._feed.make(sequences, self.sampler(sequences), self.step, [0])
                compare_gradients(self.replica, self.mesh, self.step, batch)
            warn_of_foreign_loss(self.model, self.comm)
        warn_of_random_draws(self.replica.foreign_draws(), self.comm)
        report_fallback(self.replica, self.comm)
        self._begun = True

    def tune(self) -> None:
        """Decide whether XLA compiles forward and backward, or restore that decision; a collective.

        Raises:
            UsageError: XLA was asked for and cannot compile the model.
        """
        if self.state.xla is not None:
            self.tuning.restore(self.state.xla)
        self.tuning.choose()
        self.state.xla = self.replica.xla

    def request_stop(self) -> None:
        """Ask all ranks to stop after the next step; may be called on any rank, even by a signal."""
        self._stop_requested = True

    def agree_to_stop(self) -> None:
        """Stop all ranks if any wants to, after the callbacks of an epoch's end; a collective."""

        def anybody() -> bool:
            wanted = np.array([float(self._stop_requested or self.model.stop_training)])
            self.comm.allreduce(wanted)
            return bool(wanted[0] > 0)

        self.state.stopped = self.in_place(anybody) or self.stopped

    # Data ----------------------------------------------------------------------------------------

    def sequences(self, tokens: np.ndarray | Rows) -> Rows:
        """Token ids as sequences of this trainer's length."""
        return Sequences(tokens, self.seq_len) if isinstance(tokens, np.ndarray) else tokens

    def sampler(self, sequences: Rows) -> Sampler:
        """The data order: a function of (seed, epoch, index), never of the ranks.

        Raises:
            DataError: fewer sequences than one global batch; or a corpus of a mixture without any.
        """
        if len(sequences) < self.global_batch_size:
            raise DataError(
                f"the training text makes {len(sequences)} sequences of {self.seq_len} tokens: fewer than "
                f"one global batch of {self.global_batch_size}. Use more text, or lower "
                "--global-batch-size or --seq-len"
            )
        return sampler_of(sequences, self.global_batch_size, self.seed)

    def validate(self, held_out: np.ndarray | Rows, text_bytes: int = 0) -> dict[str, float]:
        """Loss over all held-out tokens, each counted once, distributed among the ranks.

        Returns:
            val_loss (nats per token), val_accuracy, perplexity and, if ``text_bytes`` is given,
            bits_per_byte: the same on every rank.

        Raises:
            DataError: there is no validation data, or a token id outside the vocabulary.
        """
        sequences = self.sequences(held_out)
        if sequences is not held_out:  # `fit` has checked its own
            self.in_place(partial(check_token_ids, self.model, self.mesh, self.comm, self.seq_len, sequences))
        with ids_of_this_model():
            return dict(self.in_place(partial(self._validated, sequences, text_bytes)))

    def _validated(self, sequences: Rows, text_bytes: int) -> dict[str, float]:
        faults.at("validation")
        self.synchronize()
        logs = validated(self.runner, self.mesh, self.rows, sequences, text_bytes)
        if outputs_of(self.model) == FRAMES:  # which are right or wrong by degrees
            logs = {"val_loss": logs["val_loss"]}
        for metric in self.metrics:
            logs |= metric(self.runner, self.mesh, self.rows, sequences)
        return logs

    # Weights -------------------------------------------------------------------------------------

    def broadcast_weights(self) -> None:
        """Broadcast weights from the first replica of each part of the model."""
        self.replay.drop()
        self.replica.broadcast_initial_weights(self.mesh.replicas)
        untrained = [v for v in self.model.weights if not v.trainable and self.replica.holds(v)]
        give(untrained, self.mesh.replicas)
        if (
            not self._begun and not self.strategy.traits.optimizer_on_root
        ):  # the user may have built or loaded it
            give(self.replica.optimizer_step.shared_variables(), self.mesh.replicas)

    def synchronize(self) -> None:
        """Make replicas that take local steps continue from the same weights; a collective.

        If ranks without lockstep have failed, and MPI continues without them, so do the others.
        """
        if self.strategy.traits.lockstep:
            self.strategy.synchronize(self.replica, self.mesh)
            return
        self.strategy.settle(self.replica)
        survived(self.comm, self._synchronize_all, self._continue_without)

    def _synchronize_all(self) -> None:
        self.strategy.synchronize(self.replica, self.mesh)
        if not self.strategy.traits.global_losses:
            own = np.array([float(self.tokens - self.state.tokens_synchronized)])
            self.strategy.sum_over_ranks(own)
            self.state.count_from(self.state.tokens_synchronized + int(own[0]))

    def _continue_without(self, lost: list[int]) -> None:
        """Reassign the work of failed ranks to the others.

        Raises:
            RankLost: rank 0 is among them, which has the run's files, and may be the master.
        """
        if 0 in lost:
            raise RankLost(
                "rank 0 has died, which writes what a run leaves behind, and is the master where there is "
                "one",
                lost,
            )
        self.redistribute()
        self.state.lost += lost
        if lost:
            left = counted(self.comm.size)
            once(LOG, self.comm).warning(f"{named(lost)} died before step {self.step}: {left} go on")

    def redistribute(self) -> None:
        """Reassign all work to the surviving ranks; a collective."""
        self.mesh.renew()
        self.arrangement = rebuilt(self.arrangement, self.mesh, self.micro_batches, self.strategy)
        self.runner, self.my_micro_batches = self.arrangement.runner, self.arrangement.micro_batches
        self.strategy.regroup(self.my_micro_batches)
        self._feed.reassign(self.my_micro_batches)
        self._whole = None
        self.consistency_check.restart()

    def of_all(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Reduce sums over steps over all ranks, if the strategy leaves them local; a collective."""
        if self.strategy.traits.global_losses:
            return dict(sums)
        array = np.array(list(sums.values()))
        self.strategy.sum_over_ranks(array)
        return dict(zip(sums, array.tolist(), strict=True))

    def gather_state(self) -> None:
        """Reduce the state of all ranks to what a checkpoint can store; a collective."""
        self.synchronize()
        self.strategy.consolidate()

    def compare(self) -> None:
        """Run the consistency check now; a collective.

        Raises:
            LaunchError: on every rank, naming the ranks and the first weight that differs.
        """
        self.in_place(lambda: self.consistency_check.compare(self.step))

    def check_equal(self) -> str:
        """Compare the weights of all ranks, bit for bit.

        Returns:
            The SHA-256 of the whole model's.

        Raises:
            LaunchError: on every rank, naming the ranks and the first weight that differs.
        """
        self.synchronize()

        def compared() -> str:
            self.consistency_check.compare(self.step)
            return self.whole().weights_sha256()

        return str(self.in_place(compared))

    def whole(self) -> ShardedState:
        """The sharded state of model, optimizer and strategy."""
        if self._whole is None:
            traits = self.strategy.traits
            more = remembered(self.strategy, self.model, self.replica, self.mesh)
            alike = traits.replicas_equal and not traits.optimizer_on_root
            self._whole = ShardedState(self.model, self.optimizer, self.replica, self.mesh, more, alike)
        return self._whole


def weights_sha256(model: keras.Model) -> str:
    """SHA-256 of all weights, in order of creation, of a model that this process holds entirely."""
    return sha256(np.asarray(variable.value) for variable in model.weights)


def _static_seq_len(model: keras.Model) -> int | None:
    shape = getattr(model, "input_shape", None) if model.built else None
    return shape[1] if isinstance(shape, tuple) and len(shape) == 2 else None
