"""A training job and its run folder: how it starts, resumes, is saved, and what it leaves behind."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np

from tf_dist import progress
from tf_dist.checkpoint import store
from tf_dist.checkpoint.async_writer import SavedCheckpoint
from tf_dist.comm.runtime.consensus import on_root, versions
from tf_dist.comm.runtime.launch import stragglers
from tf_dist.comm.transport.base import Comm
from tf_dist.config import Config
from tf_dist.data.prepared_dataset import Prepared
from tf_dist.data.prompt import example_prompt
from tf_dist.errors import SavedAndStopped
from tf_dist.invocation import command
from tf_dist.models.build import packed_end
from tf_dist.parallel.buckets import spent
from tf_dist.run.early_stopping import StopEarly
from tf_dist.run.generate import Sampling, continuation
from tf_dist.run.numerics_environment import bits_of_all
from tf_dist.run.plots import loss_curve
from tf_dist.run.prepare_corpus import LABELS
from tf_dist.run.resume import Resume
from tf_dist.run.rollback import roll_back
from tf_dist.run.run_folder import RunFolder, point_latest_to
from tf_dist.runners.decoding_forward import forward_of
from tf_dist.tasks.causal_lm import CausalLM
from tf_dist.training.checkpoint_manager import CheckpointManager
from tf_dist.training.in_memory_checkpoint import PeerCheckpoints
from tf_dist.training.loss_spikes import Spike
from tf_dist.training.restart import Deaths
from tf_dist.training.snapshot import Snapshot, snapshot_of
from tf_dist.training.trainer import Trainer

LOG = logging.getLogger(__name__)
SAMPLE_TOKENS = 200
KEEP_ALL = 1 << 30
# With ZeRO stage 3, which all-gathers all weights for each token: more would take minutes with a large model.
SAMPLE_TOKENS_SHARDED = 20


class Job:
    """One run of ``tf-dist train``. Every method is called on every rank.

    Attributes:
        last: the newest value of each metric.
        checkpoints: in the run folder.
        peers: peer checkpoints, in memory.
        is_elsewhere: what was resumed from is no checkpoint that ``--resume auto`` would find.
        early: ends the run when validations no longer improve; None: nothing does.
        predicted: returns some predictions to show at the end, for tasks other than language modelling.
    """

    def __init__(
        self,
        config: Config,
        comm: Comm,
        corpus: Prepared,
        run: RunFolder,
        trainer: Trainer,
        deaths: Deaths | None = None,
    ) -> None:
        self.config, self.comm, self.corpus, self.run, self.trainer = config, comm, corpus, run, trainer
        self.last: dict[str, Any] = {}
        self._bits_depend_on = bits_of_all(comm)
        self._sha256: dict[int, str] = {}  # of the weights after a step
        self._deaths = deaths or Deaths()
        trainer.state.lost, trainer.in_place.recoveries = self._deaths.lost, self._deaths.recoveries
        self.checkpoints = CheckpointManager(
            comm, run.checkpoints, config.keep, config.async_save == "on", run.check_ours
        )
        self.is_elsewhere = False
        trainer.when_lost.append(self.checkpoints.give_up)
        self._deaths.before_restart[:] = [self.checkpoints.abandon]
        self.peers = self._deaths.peers or PeerCheckpoints()
        trainer.in_place.when_first.append(run.take_over)
        self._listeners = list(trainer.in_place.when_first)
        self.predicted: Callable[[], str] = str
        self.early: StopEarly | None = None
        trainer.nonfinite_gradients.before_giving_up.append(self._save_before_failing)

    def resume(self) -> None:
        """Restore what ``--resume`` means, or what is left after deaths, if there is anything.

        Raises:
            CheckpointError: it cannot be used, or is of another run.
        """
        resume = Resume(
            self.config, self.corpus, self.run, self.trainer, self.checkpoints, self.peers, self._deaths,
            self._bits_depend_on, self.keeps_copies,
        )  # fmt: skip
        resume()
        self.is_elsewhere = resume.is_elsewhere

    def begin(self) -> None:
        """Write the files known before the first step; remove incomplete checkpoints of killed jobs."""
        on_root(self.comm, lambda: store.remove_unfinished(self.run.checkpoints))
        recovery = self._deaths.over(self.trainer.step)
        if recovery is not None:
            LOG.info(f"continuing after {recovery.ms / 1e3:.1f} s")
        if self.config.replicate and not self.keeps_copies:
            why = "they need mpirun --with-ft ulfm"
            if self.comm.survives:
                why = "every rank has all state, so the others finish the step without a dead one"
            LOG.info(f"copies    no peer copies are made: {why}")
        self.run.write("config.yaml", self.config.as_yaml())
        self.run.write("tokenizer.json", self.corpus.tokenizer_json())
        if labels := self.corpus.meta.get("labels"):
            self.run.write(LABELS, json.dumps(labels, ensure_ascii=False, indent=1) + "\n")
        self.run.status(step=self.trainer.step, val_loss=self.trainer.state.val_loss)
        if self.comm.rank == 0:
            point_latest_to(self.run.path)

    def record(self, row: dict[str, Any]) -> None:
        """Keep the values of a row of metrics."""
        self.last.update(row)
        if "val_loss" in row:
            state = self.trainer.state
            state.val_loss, state.val_loss_step = row["val_loss"], row["step"]

    def roll_back(self, spike: Spike) -> None:
        """Return to a checkpoint before a spike, after `Trainer.fit` was left because of it; a collective.

        Raises:
            NumericError: that was done too often.
        """
        self.trainer.in_place.when_first[:] = self._listeners  # without those of that fit's callbacks
        self.run.later.drain()
        self.checkpoints.settle()
        if roll_back(self.checkpoints, self.trainer, self.run, spike):
            self.peers.forget()
            self._sha256 = {}  # the same step will have other weights

    def save(self) -> None:
        """Begin a checkpoint, or write it at once; wait for the last one.

        Raises:
            CheckpointError: the last one could not be written.
            LaunchError: the ranks differ: only a state that all ranks hold is worth keeping.
            DataError: the tokens have changed during the run.
        """
        if self.config.async_save == "on":
            self.checkpoints.begin(self._snapshot())
        else:
            self.checkpoints.save(self._snapshot())

    @property
    def keeps_copies(self) -> bool:
        """Whether ranks keep peer checkpoints: they were asked to, and deaths may need them."""
        return self.config.replicate > 0 and self.comm.survives and not self.trainer.in_place.can

    def keep_copies(self) -> None:
        """Save a peer checkpoint.

        Raises:
            LaunchError: the ranks differ.
        """
        self.peers.save(self._verified_snapshot(), self._deaths.restarts)

    def finish(self) -> SavedCheckpoint | None:
        """Write a checkpoint, and return it when it is on disk.

        Raises:
            CheckpointError: it could not be written.
            LaunchError: the ranks differ.
        """
        return self.checkpoints.save(self._snapshot())

    def _save_before_failing(self) -> None:
        """Save the last good weights, and remove no older checkpoint for them: that may be the one needed."""
        self.saved(self.checkpoints.save(self._snapshot(), KEEP_ALL))

    def poll(self) -> None:
        """Report a checkpoint that has been finished since the last step in ``status.json``.

        Raises:
            CheckpointError: it could not be written; on the rank that could not.
        """
        news = self.checkpoints.news()
        if news is not None:
            self._report_saved(**news)

    def saved(self, made: SavedCheckpoint | None) -> None:
        """Report the last checkpoint in ``status.json``."""
        if made is not None:
            self._sha256 = {made["step"]: made["weights_sha256"]}
            self._report_saved(**made)

    def _snapshot(self) -> Snapshot:
        """What a checkpoint on disk is to hold; a collective."""
        on_root(self.comm, self._check_files)
        return self._verified_snapshot()

    def _verified_snapshot(self) -> Snapshot:
        """The state that all ranks hold, once they have been compared; a collective."""
        self.trainer.gather_state()
        self.trainer.consistency_check.compare(self.trainer.step)
        return snapshot_of(self.trainer, self._facts())

    def _check_files(self) -> None:
        self.run.check_ours()
        self.corpus.check_unchanged()

    def _facts(self) -> dict[str, Any]:
        return {
            "config": self.config.as_dict(),
            "content_sha256": self.corpus.meta["content_sha256"],
            "tokenizer_sha256": self.corpus.meta.get("tokenizer_sha256"),
            "versions": versions(),
            "bits_depend_on": self._bits_depend_on,
        }

    def _report_end(self, state: str, exit_code: int) -> None:
        """Say in ``status.json`` how the job ends; a collective."""
        step = self.trainer.step
        if step not in self._sha256:  # a gather of all weights on a grid
            self._sha256 = {step: self.trainer.whole().weights_sha256()}
        val_loss, sha256 = self.trainer.state.val_loss, self._sha256[step]
        self._report_saved(
            step=step, val_loss=val_loss, weights_sha256=sha256, state=state, exit_code=exit_code
        )

    def _report_saved(self, **changes: object) -> None:
        """Change ``status.json``: what is saved, and what has happened so far."""
        now = {"bad_steps": self.trainer.state.skipped.total, "ranks": self.comm.size, **changes}
        if self.trainer.spikes.rollbacks:
            now["rollbacks"] = self.trainer.spikes.rollbacks
        if self.trainer.lost:
            now["ranks_lost"] = self.trainer.lost
        if self.trainer.in_place.recoveries:
            now["recoveries"] = [one._asdict() for one in self.trainer.in_place.recoveries]
        if slow := stragglers():
            now["stragglers"] = slow
        self.run.status(**now)

    def end(self, steps: int) -> None:
        """Write the loss curve and print a sample, or report that a signal stopped the run; a collective.

        Raises:
            SavedAndStopped: a signal stopped the run before its last step.
        """
        in_place = self.trainer.in_place
        ended_early = self.early is not None and self.early.over
        if ended_early and self.comm.rank == 0:
            self.run.say(f"stopped      early at step {self.trainer.step} of {steps}: {self.early}")
        if self.trainer.step < steps and not ended_early:
            in_place(lambda: self._report_end("saved", SavedAndStopped.exit_code))
            in_place.close()
            raise SavedAndStopped(
                f"saved at step {self.trainer.step} of {steps} on a signal. To resume, repeat the command "
                f"with --run-dir {self.run.path}"
            )
        in_place(lambda: self._report_end("done", 0))
        sample = in_place(self._sample)
        in_place.close()
        if self.comm.rank == 0:
            self._summarize(sample)

    def _summarize(self, sample: str) -> None:
        say, run = self.run.say, self.run
        if "loss" in self.last:
            say(f"done at step {self.trainer.step}: {_summary(self.last, self.trainer.state.val_loss)}")
        else:
            say(f"step {self.trainer.step} was already reached: raise --steps, or choose another --run-dir")
        read = [f"{name[6:]} {self.last[name]:.2f}" for name in self.last if name.startswith("epoch_")]
        if read:
            say(f"mixture      epochs of each corpus: {', '.join(read)}")
        if found := spent(self.comm):
            say(f"exchange     {found}")
        self._report_strategy()
        picture = run.path / "loss.png"
        missing = loss_curve(run.metrics, picture, f"{self.config.model}, {self.comm.size} ranks")
        say(f"no loss curve: {missing}" if missing else f"loss curve   {picture}")
        if not self._continues_text:
            say(sample, as_it_is=True)
            return
        say(f"sample       (prompt => continuation)\n{sample}", as_it_is=True)
        prompt = example_prompt(self.corpus.tokenizer, self.corpus.train)
        given = f" --prompt={shlex.quote(prompt)}" if prompt else ""
        say(f"more text    {command('generate')} --run-dir {shlex.quote(str(run.path))}{given}")

    def _report_strategy(self) -> None:
        """Print the strategy's report, if it has one, and write its facts beside the metrics."""
        report = self.trainer.strategy.report()
        if report is None:
            return
        where = ""
        if report.file:
            self.run.write(report.file, json.dumps(report.facts, indent=1) + "\n")
            where = f", in {self.run.path / report.file}"
        self.run.say(f"{report.heading:<12} {report.text}{where}")

    @property
    def _continues_text(self) -> bool:
        return self.config.task == CausalLM.name

    def _sample(self) -> str:
        """The model's continuation of the beginning of the validation text, or predictions; a collective."""
        if not self._continues_text:
            return self.predicted()
        tokens = self.corpus.val if len(self.corpus.val) else self.corpus.train
        prompt = tokens[: min(16, self.config.seq_len)]
        tokenizer, end = self.corpus.tokenizer, packed_end(self.config)
        if end is not None:
            prompt = prompt[: max(1, int(np.argmax([*(prompt == end), True])))]
        sharded = self.trainer.strategy.traits.sharding == 3
        forward = forward_of(self.trainer.runner, self.config.seq_len, lockstep=sharded)
        count = SAMPLE_TOKENS_SHARDED if sharded else SAMPLE_TOKENS
        with progress.task("writing a sample", count, "tokens") as task:
            made = []
            for token in continuation(forward, prompt, count, Sampling(), end):
                made.append(token)
                task.advance()
        return f"{tokenizer.decode(prompt)} => {tokenizer.decode(made)}\n"


def _summary(last: dict[str, Any], val_loss: float | None) -> str:
    parts = [f"loss {last['loss']:.4f}"]
    if val_loss is not None:
        parts.append(f"validation loss {val_loss:.4f}")
    if "bits_per_byte" in last:
        parts.append(f"{last['bits_per_byte']:.3f} bits per byte")
    parts.append(f"{last['tokens']:,} tokens in {last['elapsed_s']:.1f} s")
    return ", ".join(parts)
