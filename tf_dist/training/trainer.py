"""The training loop. Follow `Trainer.train_step` to see one step of distributed training.

Legend: G global rows, B rows of a micro-batch, T tokens, P parameters, R ranks.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from tf_dist import faults
from tf_dist.comm import output
from tf_dist.comm.base import Comm
from tf_dist.comm.communicators import as_comm
from tf_dist.comm.probe import prove
from tf_dist.comm.settings import same_environment
from tf_dist.comm.words import counted, named
from tf_dist.config import default_micro_batch
from tf_dist.data.ahead import Ahead
from tf_dist.data.sampler import Sampler
from tf_dist.data.tokens import Sequences
from tf_dist.errors import DataError, RankLost, UsageError
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.totals import CORRECT, LOSS, STOP, TOKENS, Totals
from tf_dist.strategies.base import StepRequest, Strategy
from tf_dist.strategies.registry import facts_of, strategy_of
from tf_dist.training.arrange import Wishes, arrange, rearranged
from tf_dist.training.bad_steps import BadSteps
from tf_dist.training.beginning import (
    agree_on_data,
    agree_on_model,
    agree_on_options,
    compare_gradients,
    find_moving,
    give,
    give_weights,
    refuse_distributed,
    refuse_probabilities,
    warn_of_foreign_loss,
)
from tf_dist.training.fit import Fit
from tf_dist.training.held import held_by_several
from tf_dist.training.in_place import InPlace
from tf_dist.training.moving import Moving
from tf_dist.training.passes import MicroBatch
from tf_dist.training.sentinel import Sentinel
from tf_dist.training.spikes import Spikes
from tf_dist.training.strategy_state import remembered, survived
from tf_dist.training.token_ids import check_token_ids, ids_of_this_model
from tf_dist.training.trainer_options import flat_options, pipeline_of
from tf_dist.training.tuning import Tuning
from tf_dist.training.validation import validated
from tf_dist.training.verified import Verified
from tf_dist.training.whole import Whole, sha256

DEFAULT_SEQ_LEN = 128
# Arguments of a Trainer that are compared in other ways.
NOT_OPTIONS = (
    "self", "model", "optimizer", "comm", "mesh", "spikes",
    "strategy", "update",
)  # fmt: skip


class Trainer:
    """Trains a Keras language model over all ranks of a `Comm`.

    A global batch of G rows is a list of G / B micro-batches, whoever computes them: micro-batches are
    dealt out to the ranks in contiguous blocks, so any number of ranks sees the same batches.

    Args:
        model: token ids (B, T) int32 -> logits (B, T, V).
            Rank 0's weights become those of all, trained or not; it alone need have built or loaded it.
        optimizer: any Keras optimizer, not yet distributed in any way.
        comm: all ranks, from ``tf_dist.connect()``; or a communicator of mpi4py, also of a part of the ranks.
        strategy: how gradients become new weights, one of `tf_dist.strategies` as in
            ``DiLoCo(outer_lr=0.7)``, or its name, or ``package.module:Class`` of your own. The same weights
            everywhere with "allreduce", "master" and "zero"; with "local-sgd", "diloco", "downpour", "easgd"
            and "gossip" each rank's own, until all meet.
        global_batch_size: G, sequences in one optimizer step.
        micro_batch_size: B, sequences in one forward and backward pass; must divide G.
            None: a quarter of G, or the next smaller divisor.
        seq_len: T; None: what the model's input says, else 128.
        clip_norm: largest global norm of the mean gradient; 0 for no clipping.
        seed: of the order of the data and of dropout.
        check_every: steps between comparisons of all ranks, see `Sentinel`; 0: only in the first steps.
        on_mismatch: "stop" when a rank differs, or "restore" it from a majority of the others.
        allreduce: what carries the sums of gradients: "window", "messages", or "auto", what is faster.
        autotune: what is timed before the first step: "exact" what changes no bit, "full" also XLA, or "off".
        xla: whether XLA compiles forward and backward, "on" or "off"; "auto": as autotune finds, or as the
            checkpoint says that is restored.
        overlap: gradients leave during the backward pass: "auto", where ranks span nodes, "on", "off".
        chunk_bytes: pieces in which sums travel between ranks; 0: what is faster.
        mesh: who shares what of the model; None: every rank has all of it.
        pipeline: options of a pipeline by name, see `tf_dist.training.pipeline.Pipeline`.
        zero_stage: of a strategy "zero" that is named: 1 optimizer state, 2 also gradients, 3 also weights.
        local: options of a strategy that is named, by the names of their flags.
        asynchrony: the same.
        compression: of gradients, by the names of the flags, as in ``{"compression": "powersgd"}``.
        update: an older name of ``strategy``.
        min_ranks: where ranks may die and the others go on (`InPlace`): with fewer the run ends.
        max_bad_steps: steps in a row that are skipped because a gradient is not finite (`BadSteps`).
        spikes: what to do where the loss jumps, and which batches are passed over; None: nothing, and none.

    Attributes:
        bad: steps that were skipped.
        in_place: runs what is done together, in spite of deaths where that is possible.
        tuning: whether XLA compiles forward and backward, and why.
        step: optimizer steps taken so far.
        tokens: target tokens trained on so far.
        elapsed_s: seconds spent in training, over all resumed runs.
        input_s: seconds spent waiting for input.
        stopped: whether the ranks have agreed to stop.
        meets_every: steps after each multiple of which somebody looks at the model of all ranks.
        last_step: of the present `fit`.
        lost: ranks that have died, as they were numbered in the beginning.
        fitted: the step at which the last `fit` ended, from which the next one counts.

    Raises:
        UsageError: sizes that do not fit, an unknown strategy, or a distributed optimizer.
        LaunchError: on every rank, naming what differs: the ranks have other options, models or optimizers.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        comm: Comm | Any,
        strategy: Strategy | str = "allreduce",
        *,
        global_batch_size: int = 32,
        micro_batch_size: int | None = None,
        seq_len: int | None = None,
        clip_norm: float = 0.0,
        seed: int = 1,
        check_every: int = 100,
        on_mismatch: str = "stop",
        allreduce: str = "auto",
        autotune: str = "exact",
        xla: str = "auto",
        overlap: str = "auto",
        chunk_bytes: int = 0,
        mesh: Mesh | None = None,
        zero_stage: int = 1,
        pipeline: Mapping[str, Any] | None = None,
        local: Mapping[str, Any] | None = None,
        compression: Mapping[str, Any] | None = None,
        asynchrony: Mapping[str, Any] | None = None,
        min_ranks: int = 1,
        max_bad_steps: int = 10,
        spikes: Spikes | None = None,
        update: Strategy | str | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in NOT_OPTIONS}
        wanted = strategy if update is None else update
        refuse_distributed(optimizer)
        self.comm = comm = as_comm(comm)
        self.mesh = mesh or Mesh(comm)
        self.spikes = spikes or Spikes()
        # Where ranks share rows, a rank's model takes a share of them.
        self.seq_len = seq_len or (_static_seq_len(model) or DEFAULT_SEQ_LEN) * self.mesh.sequence.size
        more = {"seq_len": self.seq_len, "mesh": self.mesh.shape, "spikes": vars(self.spikes)}
        agree_on_options(comm, {**given, **more, **facts_of(wanted)})
        flat = flat_options(zero_stage, local, asynchrony, compression)
        self.strategy = strategy_of(wanted, flat)
        self.rows = _rows(global_batch_size, micro_batch_size)
        self.model, self.optimizer = model, optimizer
        self.global_batch_size, self.clip_norm, self.seed = global_batch_size, clip_norm, seed
        self.micro_batches = global_batch_size // self.rows
        self.wishes = Wishes(allreduce, chunk_bytes, autotune != "off", overlap, pipeline_of(pipeline))
        sizes = (self.rows, self.seq_len, seed, self.micro_batches)
        self._prepare_model()
        self.arrangement = arrange(model, optimizer, self.mesh, *sizes, self.strategy, self.wishes)
        self.replica, self.passes = self.arrangement.replica, self.arrangement.passes
        self.my_micro_batches = self.arrangement.micro_batches
        self.tuning = Tuning(self.replica, comm, autotune, xla, self.arrangement.no_xla)
        self.sentinel = Sentinel(comm, held_by_several(self), check_every, on_mismatch)
        self.sentinel.ready = lambda: self.strategy.in_sync
        self._count_from_zero()
        self.verified = Verified(self, on_mismatch == "restore")
        self.in_place, self.bad = InPlace(self, min_ranks), BadSteps(self, max_bad_steps)
        model.stop_training = False

    def _count_from_zero(self) -> None:
        self.step, self.tokens, self.elapsed_s, self.input_s = 0, 0, 0.0, 0.0
        self._whole: Whole | None = None
        self._ahead: tuple[Sequences, Sampler, Ahead[list[MicroBatch]]] | None = None
        self.last_step, self.meets_every = 0, set[int]()
        self._tokens_met, self.lost = 0, list[int]()
        self.stopped = self._stop_requested = self._begun = False
        self.fitted = 0

    def _prepare_model(self) -> None:
        """Let all ranks have one model, before the optimizer makes state of its weights; a collective."""
        if not self.model.built:
            self.model(np.zeros((1, self.seq_len // self.mesh.sequence.size), np.int32))
        agree_on_model(self.model, self.optimizer, self.mesh)
        give_weights(self.model, self.mesh)

    @property
    def _alike(self) -> bool:
        """Whether all ranks do the same with their micro-batches, so that one of them may be called slow."""
        traits = self.strategy.traits
        return self.mesh.plain and traits.lockstep and not traits.optimizer_on_root

    # One step ------------------------------------------------------------------------------------

    def train_step(self, sequences: Sequences, sampler: Sampler) -> dict[str, float]:
        """Take one optimizer step on one global batch, over all ranks.

        Returns:
            loss (mean nats per token), accuracy, grad_norm and tokens: the same on every rank, or with a
            strategy without `global_losses` what this rank knows. Where grad_norm is not finite, no weight
            has changed.

        Raises:
            NumericError: it was not finite too often in a row, or never can be again.
            Spike: the loss has jumped, and ``spikes`` is to roll back.
        """
        if not self._begun:
            self._begin(sequences, None, {})
        self.comm.record.begin_step(self.step + 1)
        with ids_of_this_model():
            logs = dict(self.in_place(partial(self._step, sequences, sampler)))
        self.comm.record.end_step(len(self.my_micro_batches) * self._alike)
        self.bad.check()
        if self.strategy.traits.global_losses and (warning := self.spikes.look(self.step, logs["loss"])):
            self.bad.say(warning)
        return logs

    def _step(self, sequences: Sequences, sampler: Sampler) -> dict[str, float]:
        self._data = sequences, sampler
        faults.begin(self.step + 1, self.replica.variables)
        self.sentinel.watch(self.step)
        return self.take_once_more()

    def take_once_more(self) -> dict[str, float]:
        """Take the step of this number, on the data of the last one; as `train_step`, inside of a phase."""
        sequences, sampler = self._data
        faults.at("forward", self.step + 1)
        totals = Totals(self.micro_batches)
        traits = self.strategy.traits
        if (self._stop_requested or self.model.stop_training) and traits.global_losses:
            totals.ask_to_stop()
        norm = self._gradient_and_step(sequences, sampler, totals)
        if math.isfinite(norm) or not traits.lockstep:
            self.bad.in_a_row = 0
        elif self.sentinel.ready() and self.sentinel.compare(self.step):
            return self.take_once_more()  # a replica that had drifted is put right
        else:
            self.bad.note(norm, totals, self._batches(sequences, sampler))
        self.step += 1
        counts = totals.sum()
        self.tokens += int(counts[TOKENS])
        self.stopped = bool(counts[STOP])  # any rank's wish, agreed by the reduction itself
        count = max(counts[TOKENS], 1.0)
        return {
            "loss": float(counts[LOSS] / count),
            "accuracy": float(counts[CORRECT] / count),
            "grad_norm": norm,
            "tokens": float(counts[TOKENS]),
        }

    def _gradient_and_step(self, sequences: Sequences, sampler: Sampler, totals: Totals) -> float:
        """Do the part of a step that is this rank's; the norm of the gradient."""
        moving = getattr(self.replica, "moving", Moving())
        moved: list[np.ndarray] | None = None

        def gradients() -> list[np.ndarray]:
            nonlocal moved
            self.passes.train(self.step, self._batches(sequences, sampler), totals)
            terms = self.passes.terms()
            faults.at("gradient")
            faults.spoil(terms)
            moved = moving.reduce(self.comm, self.micro_batches)
            return terms

        request = StepRequest(
            self.step, self._next_meeting(), gradients, partial(self._made, sequences, sampler),
            self.arrangement.order, totals, self.clip_norm, self.replica, self.mesh,
        )  # fmt: skip
        norm = float(self.strategy.step(request))
        if moved is not None and math.isfinite(norm):
            moving.move(moved)
        return norm

    def _next_meeting(self) -> int:
        """The step before which somebody will look at the model of all ranks."""
        regular = [self.step // every * every + every for every in self.meets_every]
        return min([max(self.last_step, self.step + 1), *regular])

    def _made(
        self, sequences: Sequences, sampler: Sampler, step: int, numbers: Sequence[int]
    ) -> list[MicroBatch]:
        """Some micro-batches of a step."""
        rows_G = sampler.batch(self.spikes.batch_of(step))
        return [self.micro_batch(sequences, number, rows_G[number * self.rows :]) for number in numbers]

    def _batches(self, sequences: Sequences, sampler: Sampler) -> list[MicroBatch]:
        """The micro-batches of the step that are this rank's."""
        begun = time.perf_counter()
        if self._ahead is None or self._ahead[:2] != (sequences, sampler):
            make = partial(self._made, sequences, sampler, numbers=self.my_micro_batches)
            self._ahead = sequences, sampler, Ahead(make)
        batches = self._ahead[2](self.step)
        self.input_s += time.perf_counter() - begun
        return batches

    def micro_batch(self, sequences: Sequences, number: int, indices: np.ndarray) -> MicroBatch:
        """The first B of these rows."""
        return MicroBatch(number, *sequences.rows(indices[: self.rows]))

    # Many steps ----------------------------------------------------------------------------------

    def fit(
        self,
        tokens: np.ndarray | Sequences,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        validation: np.ndarray | Sequences | None = None,
        validation_bytes: int = 0,
        eval_every: int = 0,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> dict[str, list[float]]:
        """Train for ``steps`` optimizer steps.

        They are counted from where the last `fit` has ended, as in Keras: a second one trains as much again.
        Where training was restored, or a `fit` was left by an error, what was done before counts as well.

        Callbacks follow Keras's protocol with the same values on every rank, writers on rank 0 alone. A Keras
        "epoch" is the stretch from one validation to the next, or a pass over the data when
        ``eval_every`` is 0; a batch is an optimizer step, counted from the beginning of its epoch.

        Args:
            tokens: 1-D token ids, or `Sequences` of them.
            steps: optimizer steps, 1 or more; None: as many as the epochs take.
            epochs: passes over the data; None: one.
            validation: held-out tokens; all of them are used, shared out among the ranks.
            validation_bytes: UTF-8 bytes of their text, for bits per byte; 0 if not known.
            eval_every: steps between validations; 0 for never.
            callbacks: Keras callbacks.

        Returns:
            The logs of each epoch of this `fit`, by name, as Keras's ``History.history``. Empty, with a
            warning, where a run was restored that has done all of this.

        Raises:
            UsageError: fewer than one step; a model that ends in softmax.
            DataError: fewer sequences than one global batch, or a token id that the model does not have.
            NumericError: gradients were not finite, see `max_bad_steps`.
            LaunchError: the ranks do not talk, or their data, arguments, weights or optimizers differ.
        """
        _check_counts(steps, epochs, eval_every)
        sequences = self.sequences(tokens)
        held_out = None if validation is None else self.sequences(validation)
        check_token_ids(self.model, self.mesh, self.comm, sequences, held_out)
        self.stopped, whole = False, self.sampler(sequences).steps_per_epoch
        fit = Fit(
            self,
            sequences,
            held_out if eval_every else None,
            steps=self.fitted + ((epochs or 1) * whole if steps is None else steps),
            stretch=eval_every or whole,
            validation_bytes=validation_bytes,
            callbacks=callbacks,
        )
        options = {"steps": steps, "epochs": epochs, "eval_every": eval_every, "bytes": validation_bytes}
        self._begin(sequences, held_out, options)
        self._warn_if_reached(fit.steps)
        logs = fit.run()
        self.replica.optimizer_step.give_back()
        self._stop_requested, self.fitted = False, self.step
        return logs

    def _warn_if_reached(self, steps: int) -> None:
        if steps <= self.step and self.comm.rank == 0:
            warnings.warn(f"step {self.step} is reached already: nothing is trained", stacklevel=3)

    def _begin(self, sequences: Sequences, held_out: Sequences | None, options: Mapping[str, Any]) -> None:
        """Settle what must hold before the next step (`tf_dist.training.beginning`); a collective."""
        prove(self.comm)
        same_environment(self.comm)
        position = {"step": self.step, "counted from": self.fitted, "seq_len": self.seq_len}
        agree_on_data(self.comm, sequences, held_out, {**position, **options})
        self.broadcast_weights()
        if not self._begun:
            find_moving(self)
        self.tuning.choose()
        if not self._begun:
            with ids_of_this_model():
                refuse_probabilities(self, sequences)
                compare_gradients(self, sequences, self.sampler(sequences))
            warn_of_foreign_loss(self.model, self.comm)
        self._warn_of_foreign_draws()
        self._say_if_variables_step_alone()
        self._begun = True

    def _warn_of_foreign_draws(self) -> None:
        kinds = self.replica.foreign_draws()
        if kinds and self.comm.rank == 0:
            warnings.warn(
                f"the model draws random numbers by {', '.join(kinds)}, whose state is in each process: "
                "results depend on the number of ranks, and differ after a resume. Use keras.random instead",
                stacklevel=4,
            )

    def _say_if_variables_step_alone(self) -> None:
        reason = self.replica.optimizer_step.reason
        if reason and self.comm.rank == 0:
            output.say(f"optimizer: {reason}, so it steps each variable by itself")

    def request_stop(self) -> None:
        """Ask all ranks to stop after the next step; may be called on any rank, even by a signal."""
        self._stop_requested = True

    def agree_to_stop(self) -> None:
        """After callbacks have seen the end of an epoch: what one rank wants, all do; a collective."""

        def anybody() -> bool:
            wanted = np.array([float(self._stop_requested or self.model.stop_training)])
            self.comm.allreduce(wanted)
            return bool(wanted[0] > 0)

        self.stopped = self.in_place(anybody) or self.stopped

    # Data ----------------------------------------------------------------------------------------

    def sequences(self, tokens: np.ndarray | Sequences) -> Sequences:
        """Token ids as sequences of this trainer's length."""
        return tokens if isinstance(tokens, Sequences) else Sequences(tokens, self.seq_len)

    def sampler(self, sequences: Sequences) -> Sampler:
        """The order of the data: a function of (seed, epoch, index), never of the ranks.

        Raises:
            DataError: fewer sequences than one global batch.
        """
        if len(sequences) < self.global_batch_size:
            raise DataError(
                f"the training text makes {len(sequences)} sequences of {self.seq_len} tokens: fewer than "
                f"one global batch of {self.global_batch_size}. Use more text, or lower "
                "--global-batch-size or --seq-len"
            )
        return Sampler(len(sequences), self.global_batch_size, self.seed)

    def validate(self, held_out: np.ndarray | Sequences, text_bytes: int = 0) -> dict[str, float]:
        """Loss over all held-out tokens, each counted once, shared out among the ranks.

        Returns:
            val_loss (nats per token), val_accuracy, perplexity and, where ``text_bytes`` is given,
            bits_per_byte: the same on every rank.

        Raises:
            DataError: there is nothing to validate on, or a token id that the model does not have.
        """
        sequences = self.sequences(held_out)
        if sequences is not held_out:  # those of `fit` have been looked at
            self.in_place(partial(check_token_ids, self.model, self.mesh, self.comm, sequences))
        with ids_of_this_model():
            return dict(self.in_place(partial(validated, self, sequences, text_bytes)))

    # Weights -------------------------------------------------------------------------------------

    def broadcast_weights(self) -> None:
        """Give all replicas of a part of the model the weights of the first one."""
        self.verified.drop()
        self.replica.give_weights(self.mesh.replicas)
        untrained = [v for v in self.model.weights if not v.trainable and self.replica.holds(v)]
        give(untrained, self.mesh.replicas)
        if (
            not self._begun and not self.strategy.traits.optimizer_on_root
        ):  # one that somebody has built or loaded
            give(self.replica.optimizer_step.shared_variables(), self.mesh.replicas)

    def meet(self) -> None:
        """Let all replicas go on from the same weights, where each steps by itself; a collective.

        Where ranks that train at their own pace have died, and MPI goes on without them, so do the others.
        """
        if self.strategy.traits.lockstep:
            self.strategy.synchronize(self.replica, self.mesh)
            return
        self.strategy.settle(self.replica)
        survived(self.comm, self._meet, self._go_on_without)

    def _meet(self) -> None:
        self.strategy.synchronize(self.replica, self.mesh)
        if not self.strategy.traits.global_losses:
            own = np.array([float(self.tokens - self._tokens_met)])
            self.strategy.sum_over_ranks(own)
            self.tokens = self._tokens_met = self._tokens_met + int(own[0])

    def _go_on_without(self, lost: list[int]) -> None:
        """Share the work of ranks that have died among the others.

        Raises:
            RankLost: rank 0 is among them, which has the run's files, and may be the master.
        """
        if 0 in lost:
            raise RankLost(
                "rank 0 has died, which writes what a run leaves behind, and is the master where there is "
                "one",
                lost,
            )
        self.share_anew()
        self.lost += lost
        if self.comm.rank == 0 and lost:
            left = counted(self.comm.size)
            output.say(f"{named(lost)} died before step {self.step}: {left} go on")

    def share_anew(self) -> None:
        """Share out all work among the ranks that are left; a collective."""
        self.mesh.renew()
        self.arrangement = rearranged(self.arrangement, self.mesh, self.micro_batches, self.strategy)
        self.passes, self.my_micro_batches = self.arrangement.passes, self.arrangement.micro_batches
        self.strategy.regroup(self.my_micro_batches)
        self._ahead = self._whole = None
        self.sentinel.begin_anew()

    def resume_counting(self, tokens: int) -> None:
        """Go on from so many tokens of all ranks."""
        self.tokens = self._tokens_met = tokens

    def of_all(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums over steps, of all ranks, where each knows its own alone; a collective."""
        if self.strategy.traits.global_losses:
            return dict(sums)
        array = np.array(list(sums.values()))
        self.strategy.sum_over_ranks(array)
        return dict(zip(sums, array.tolist(), strict=True))

    def put_together(self) -> None:
        """Leave nothing on a rank that a checkpoint could not keep; a collective."""
        self.meet()
        self.strategy.consolidate()

    def check_equal(self) -> str:
        """Compare the weights of all ranks, bit for bit.

        Returns:
            The SHA-256 of the whole model's.

        Raises:
            LaunchError: on every rank, naming the ranks and the first weight that differs.
        """
        self.meet()

        def compared() -> str:
            self.sentinel.compare(self.step)
            return self.whole().weights_sha256()

        return str(self.in_place(compared))

    def whole(self) -> Whole:
        """The whole model and its optimizer, of which ranks hold parts."""
        if self._whole is None:
            traits = self.strategy.traits
            more = remembered(self.strategy, self.model, self.replica, self.mesh)
            alike = traits.replicas_equal and not traits.optimizer_on_root
            self._whole = Whole(self.model, self.optimizer, self.replica, self.mesh, more, alike)
        return self._whole


def weights_sha256(model: keras.Model) -> str:
    """SHA-256 of all weights in order of creation, of a model that this process has all of."""
    return sha256(np.asarray(variable.value) for variable in model.weights)


def _check_counts(steps: int | None, epochs: int | None, eval_every: int) -> None:
    if min(1 if steps is None else steps, 1 if epochs is None else epochs) < 1 or eval_every < 0:
        raise UsageError(f"steps {steps}, epochs {epochs}: at least 1; eval_every {eval_every}: at least 0")


def _rows(global_batch_size: int, micro_batch_size: int | None) -> int:
    """Rows of a micro-batch."""
    if global_batch_size < 1 or (micro_batch_size or 0) < 0:
        raise UsageError(
            f"global_batch_size {global_batch_size}, micro_batch_size {micro_batch_size}: at least 1"
        )
    rows = micro_batch_size or default_micro_batch(global_batch_size)
    if global_batch_size % rows:
        raise UsageError(f"micro_batch_size {rows} does not divide global_batch_size {global_batch_size}")
    return rows


def _static_seq_len(model: keras.Model) -> int | None:
    shape = getattr(model, "input_shape", None) if model.built else None
    return shape[1] if isinstance(shape, tuple) and len(shape) == 2 else None
