"""A training job and its run folder: how it begins, is resumed, is saved, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist import faults, progress
from tf_dist.comm.agree import on_root, versions
from tf_dist.comm.base import Comm
from tf_dist.comm.launch import stragglers
from tf_dist.comm.words import counted, named
from tf_dist.config import Config
from tf_dist.data.prepared import Prepared
from tf_dist.data.prompt import example_prompt
from tf_dist.errors import CheckpointError, SavedAndStopped
from tf_dist.invocation import command
from tf_dist.parallel.buckets import spent
from tf_dist.training import checkpoint, shards, state
from tf_dist.training.begin_again import Deaths
from tf_dist.training.checked_facts import check_facts
from tf_dist.training.environment import bits_of_all, changes
from tf_dist.training.generate import Sampling, write_on
from tf_dist.training.manifest import read_manifest
from tf_dist.training.neighbours import Neighbours
from tf_dist.training.plots import loss_curve
from tf_dist.training.rolling_back import kept, roll_back, set_aside_after
from tf_dist.training.run import RunFolder, point_latest_to
from tf_dist.training.run_callbacks import Tally
from tf_dist.training.saving import Saver
from tf_dist.training.spikes import Spike
from tf_dist.training.trainer import Trainer

SAMPLE_TOKENS = 200
KEEP_ALL = 1 << 30
# Where all weights travel for each token (the third stage of ZeRO): of a large model many would take minutes.
SAMPLE_TOKENS_OF_TRAVELLERS = 20


class Job:
    """One run of ``tf-dist train``. Every method is called on every rank.

    Attributes:
        last: the newest value of each metric.
        tally: of the row of the metrics that is under way.
        neighbours: keep copies of what ranks have, in memory.
        is_elsewhere: what the run goes on from is no checkpoint that ``--resume auto`` would find.
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
        self.tally = Tally()
        self._bits_depend_on = bits_of_all(comm)
        self._sha256: dict[int, str] = {}  # of the weights after a step
        self._deaths = deaths or Deaths()
        trainer.lost, trainer.in_place.recoveries = self._deaths.lost, self._deaths.recoveries
        trainer.sentinel.say = trainer.bad.say = run.say
        self._validated: int | None = None  # the step of the last validation of this job
        self.saver = Saver(
            trainer, run.checkpoints, config.keep, config.async_save == "on", run.say, run.check_ours
        )
        self.is_elsewhere = False
        self._deaths.when_lost[:] = [self.saver.abandon]
        self.neighbours = self._deaths.neighbours or Neighbours(run.say)
        trainer.in_place.when_first.append(run.take_over)
        trainer.bad.before_giving_up.append(self._save_beside_all)

    def resume(self) -> None:
        """Go on from the checkpoint that ``--resume`` means, if there is one.

        Raises:
            CheckpointError: it cannot be used, or is of another run.
        """
        if self._deaths.trainings:
            self._begin_again()
            return
        if self.config.resume == "never":
            on_root(self.comm, self.run.set_aside)
            return
        found = on_root(self.comm, self._find)
        if found is None:
            on_root(self.comm, lambda: self.run.drop_metrics_after(-1, set_aside=True))
            return
        on_root(self.comm, self.corpus.verify)
        self._go_on_from(found)

    @property
    def _goes_another_way(self) -> bool:
        """Whether a checkpoint was named to go on from, and this is not done a second time after deaths."""
        return self.config.resume not in ("auto", "never") and not self._deaths.trainings

    def _leave_other_way(self, source: Path) -> bool:
        """Set aside what the run folder has of steps that are taken anew; on rank 0.

        So ``--resume auto`` goes on with this way, and not with the one that was left. Returns whether it
        would not find ``source``.
        """
        folder, step = self.run.checkpoints, self.trainer.step
        if source.resolve().parent != folder.resolve():
            self.run.set_aside()
            return True
        own = folder / source.name
        count = set_aside_after(folder, step, own)
        if count:
            self.run.say(f"{count} checkpoints of steps that are taken anew are now left-step-* in {folder}")
        elsewhere = own != checkpoint.path_of(folder, step)
        if not elsewhere:
            shards.point_to(own, "latest")
        return elsewhere

    def _begin_again(self) -> None:
        """Go on from what this job has saved, or from where it began."""
        self.run.be_first(self.comm)
        left = counted(self.comm.size)
        dead = self._deaths.newest
        why = f"{named(dead)} died" if dead else "an exchange has failed, and nobody died"
        copies = self.neighbours.newest(self.comm)
        after = -1 if copies is None else copies.step
        found = on_root(self.comm, lambda: self._checked(self._newest(after)))
        on_root(self.comm, self.corpus.check_unchanged)  # they are mapped as before, not anew
        if copies is not None and found is None:
            self.run.say(f"{why}: {left} begin again from copies in memory")
            self._be_at(kept(self.neighbours.give_back(self.trainer, copies)), "memory")
            return
        lost = " (copies in memory died with them)" if self.keeps_copies and copies is None else ""
        self.run.say(f"{why}: {left} begin again from the newest checkpoint{lost}")
        if found is None and self.config.resume not in ("auto", "never"):
            found = on_root(self.comm, self._find)
        if found is None:
            on_root(self.comm, lambda: self.run.drop_metrics_after(-1))
        self._go_on_from(found)

    def _go_on_from(self, found: dict[str, Any] | None) -> None:
        if found is None:
            return
        faults.at("load")
        path = Path(found["path"])
        with progress.task("reading the checkpoint"):
            state.restore(self.trainer, path)
        if self._goes_another_way:
            self.is_elsewhere = on_root(self.comm, lambda: self._leave_other_way(path))
        self._be_at(found, found["path"])

    def _be_at(self, facts: dict[str, Any], source: str) -> None:
        """Remember what was kept with the state that the trainer has now."""
        self.last["val_loss"] = facts["val_loss"]
        self.trainer.bad.counters, self.trainer.spikes.facts = facts["bad_steps"], facts["spikes"]
        self.tally.go_on_from(facts["row"], facts["last_row"])
        step, aside = self.trainer.step, self._goes_another_way
        on_root(self.comm, lambda: self.run.drop_metrics_after(step, aside))
        self.run.say(f"resumed at step {self.trainer.step} from {source}")

    def _find(self) -> dict[str, Any] | None:
        """The checkpoint to resume from, checked; on rank 0."""
        wanted = Path(self.config.resume)
        if self.config.resume == "auto":
            path = self._newest()
        elif os.path.lexists(wanted / "manifest.json"):
            path = wanted
        else:
            path = checkpoint.newest(wanted / "checkpoints", self.run.say)
            if path is None:
                raise CheckpointError(f"--resume {wanted}: neither a checkpoint nor a run folder with one")
        return self._checked(path)

    def _newest(self, after: int = -1) -> Path | None:
        return checkpoint.newest(self.run.checkpoints, self.run.say, after)

    def _checked(self, path: Path | None) -> dict[str, Any] | None:
        """Whether a checkpoint is of this run; on rank 0."""
        if path is None:
            return None
        facts = read_manifest(path)["facts"]
        check_facts(facts, path)
        content = self.corpus.meta["content_sha256"]
        state.check_same_run(facts, self.config, content, self.run.say)
        changed = changes(facts.get("bits_depend_on", {}), self._bits_depend_on)
        if changed:
            self.run.say(
                "resuming where last bits may differ, for these have changed: " + "; ".join(changed)[:2000]
            )
        return {"path": str(path), **kept(facts)}

    def begin(self) -> None:
        """Write what is known before the first step; remove what a job that was killed left half saved."""
        on_root(self.comm, lambda: checkpoint.remove_unfinished(self.run.checkpoints))
        recovery = self._deaths.over(self.trainer.step)
        if recovery is not None:
            self.run.say(f"going on after {recovery.ms / 1e3:.1f} s")
        if self.config.replicate and not self.keeps_copies:
            why = "this is for mpirun --with-ft ulfm"
            if self.comm.survives:
                why = "who is left can finish a step"
            self.run.say(f"copies    none are kept in memory: {why}")
        self.run.write("config.yaml", self.config.as_yaml())
        self.run.write("tokenizer.json", self.corpus.tokenizer_json())
        self.run.status(step=self.trainer.step, val_loss=self.last.get("val_loss"))
        if self.comm.rank == 0:
            point_latest_to(self.run.path)

    def heard(self, row: dict[str, Any]) -> None:
        """Remember a row of the metrics."""
        self.last.update(row)
        if "val_loss" in row:
            self._validated = row["step"]

    def train(self, fit: Callable[[], object]) -> None:
        """Call ``fit``, and again each time that it was left because the loss has jumped."""
        listeners = list(self.trainer.in_place.when_first)
        while True:
            try:
                fit()
                return
            except Spike as spike:
                self.trainer.in_place.when_first[:] = listeners  # without those of callbacks of this `fit`
                self.run.later.drain()
                self.saver.settle()
                if roll_back(self, spike):
                    self._sha256 = {}  # there are other weights after the same number of steps

    def save(self) -> None:
        """Have a checkpoint written, and wait for the last one.

        Raises:
            CheckpointError: the last one could not be written.
            LaunchError: the ranks differ: only what all of them hold is worth keeping.
            DataError: the tokens have changed under the run.
        """
        self._compare()
        if self.config.async_save == "on":
            self.saver.begin(self._facts())
        else:
            self.saver.save(self._facts())

    @property
    def keeps_copies(self) -> bool:
        """Whether ranks are to keep copies in memory of what others have, and may need them."""
        return self.config.replicate > 0 and self.comm.survives and not self.trainer.in_place.can

    def keep_copies(self) -> None:
        """Have neighbours keep copies of what each rank has.

        Raises:
            LaunchError: the ranks differ.
        """
        self.trainer.put_together()
        self.trainer.sentinel.compare(self.trainer.step)
        facts = self._facts() | {"last_row": self.tally.last}
        self.neighbours.keep(self.trainer, facts, self._deaths.trainings)

    def finish(self) -> dict[str, Any] | None:
        """Have a checkpoint written, and wait until it is on the disk; what `saved` is to be told.

        Raises:
            CheckpointError: it could not be written.
            LaunchError: the ranks differ.
        """
        self._compare()
        return self.saver.save(self._facts())

    def _save_beside_all(self) -> None:
        """Save the last good weights, and remove no older checkpoint for them: they may be what is needed."""
        self._compare()
        self.saved(self.saver.save(self._facts(), KEEP_ALL))

    def look(self) -> None:
        """Say in ``status.json`` what has been saved since the last step.

        Raises:
            CheckpointError: it could not be written; on the rank that could not.
        """
        news = self.saver.news()
        if news is not None:
            self._say_saved(news)

    def saved(self, made: dict[str, Any] | None) -> None:
        """Say in ``status.json`` that the end is saved."""
        if made is not None:
            self._sha256 = {made["step"]: made["weights_sha256"]}
            self._say_saved(made)

    def _compare(self) -> None:
        on_root(self.comm, self._check_files)
        self.trainer.put_together()
        self.trainer.sentinel.compare(self.trainer.step)

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
            "val_loss": self.last.get("val_loss"),
            "bad_steps": self.trainer.bad.counters,
            "spikes": self.trainer.spikes.facts,
            "val_loss_step": self._validated,
            "row": self.tally.facts,
        }

    def _status(self, **changes: Any) -> None:
        step = self.trainer.step
        if step not in self._sha256:  # on a grid all weights travel for it
            self._sha256 = {step: self.trainer.whole().weights_sha256()}
        now = {"step": step, "val_loss": self.last.get("val_loss"), "weights_sha256": self._sha256[step]}
        self._say_saved(now, **changes)

    def _say_saved(self, saved: dict[str, Any], **changes: Any) -> None:
        now = {"bad_steps": self.trainer.bad.total, "ranks": self.comm.size, **saved}
        if self.trainer.spikes.rollbacks:
            now["rollbacks"] = self.trainer.spikes.rollbacks
        if self.trainer.lost:
            now["ranks_lost"] = self.trainer.lost
        if self.trainer.in_place.recoveries:
            now["recoveries"] = [one._asdict() for one in self.trainer.in_place.recoveries]
        if slow := stragglers():
            now["stragglers"] = slow
        self.run.status(**now, **changes)

    def end(self, steps: int) -> None:
        """Leave a picture and a sample of text, or ask to be started again.

        Raises:
            SavedAndStopped: a signal stopped the run before its last step.
        """
        in_place = self.trainer.in_place
        if self.trainer.step < steps:
            in_place(lambda: self._status(state="saved", exit_code=SavedAndStopped.exit_code))
            in_place.close()
            raise SavedAndStopped(
                f"saved at step {self.trainer.step} of {steps} on a signal. The same command with "
                f"--run-dir {self.run.path} goes on"
            )
        in_place(lambda: self._status(state="done", exit_code=0))
        sample = in_place(self._sample)
        in_place.close()
        if self.comm.rank == 0:
            self._leave_behind(sample)

    def _leave_behind(self, sample: str) -> None:
        say, run = self.run.say, self.run
        if "loss" in self.last:
            say(f"done at step {self.trainer.step}: {_summary(self.last)}")
        else:
            say(f"step {self.trainer.step} was already reached: raise --steps, or choose another --run-dir")
        if found := spent(self.comm):
            say(f"exchange     {found}")
        self._report_strategy()
        picture = run.path / "loss.png"
        missing = loss_curve(run.metrics, picture, f"{self.config.model}, {self.comm.size} ranks")
        say(f"no picture of the loss: {missing}" if missing else f"loss curve   {picture}")
        say(f"sample       (prompt => continuation)\n{sample}", as_it_is=True)
        prompt = example_prompt(self.corpus.tokenizer, self.corpus.train)
        given = f" --prompt={shlex.quote(prompt)}" if prompt else ""
        say(f"more text    {command('generate')} --run-dir {shlex.quote(str(run.path))}{given}")

    def _report_strategy(self) -> None:
        """What the strategy has cost, where it tells; facts are kept beside the metrics."""
        report = self.trainer.strategy.report()
        if report is None:
            return
        where = ""
        if report.file:
            self.run.write(report.file, json.dumps(report.facts, indent=1) + "\n")
            where = f", in {self.run.path / report.file}"
        self.run.say(f"{report.heading:<12} {report.text}{where}")

    def _sample(self) -> str:
        """Text that the model continues from the beginning of the validation text; a collective."""
        tokens = self.corpus.val if len(self.corpus.val) else self.corpus.train
        prompt = tokens[: min(16, self.config.seq_len)]
        passes, tokenizer = self.trainer.passes, self.corpus.tokenizer

        def logits_at(window_1xT: np.ndarray, place: int) -> np.ndarray:
            return np.asarray(passes.logits(window_1xT)[place])

        travel = self.trainer.strategy.traits.sharding == 3
        count = SAMPLE_TOKENS_OF_TRAVELLERS if travel else SAMPLE_TOKENS
        with progress.task("writing a sample", count, "tokens") as task:
            made = []
            for token in write_on(logits_at, self.config.seq_len, prompt, count, Sampling()):
                made.append(token)
                task.advance()
        return f"{tokenizer.decode(prompt)} => {tokenizer.decode(made)}\n"


def _summary(last: dict[str, Any]) -> str:
    parts = [f"loss {last['loss']:.4f}"]
    if last.get("val_loss") is not None:
        parts.append(f"validation loss {last['val_loss']:.4f}")
    if "bits_per_byte" in last:
        parts.append(f"{last['bits_per_byte']:.3f} bits per byte")
    parts.append(f"{last['tokens']:,} tokens in {last['elapsed_s']:.1f} s")
    return ", ".join(parts)
