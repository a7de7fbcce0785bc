"""Where a training starts: from a snapshot that `recover` finds, with a run folder that matches it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tf_dist import faults
from tf_dist.checkpoint import shards, store
from tf_dist.checkpoint.checked_facts import check_facts
from tf_dist.comm.formatting import counted, named
from tf_dist.comm.runtime.consensus import on_root
from tf_dist.config import Config
from tf_dist.data.prepared_dataset import Prepared
from tf_dist.errors import CheckpointError
from tf_dist.run.init_from import initialize
from tf_dist.run.numerics_environment import changes
from tf_dist.run.rollback import set_aside_after
from tf_dist.run.run_folder import RunFolder
from tf_dist.training import state_dict
from tf_dist.training.checkpoint_manager import CheckpointManager
from tf_dist.training.checkpoint_reader import CheckpointReader
from tf_dist.training.in_memory_checkpoint import PeerCheckpoints
from tf_dist.training.restart import Deaths
from tf_dist.training.snapshot import SnapshotSource, recover
from tf_dist.training.trainer import Trainer

LOG = logging.getLogger(__name__)


class Resume:
    """Starts the training of a job. Every method is called on every rank.

    Args:
        config: of the run.
        corpus: its tokens.
        run: its folder.
        trainer: receives the state of a snapshot.
        checkpoints: in the run folder.
        peers: peer checkpoints of this job.
        deaths: that this job has survived.
        bits_depend_on: `tf_dist.run.numerics_environment.bits_of_all`.
        replicates: this job makes peer checkpoints.

    Attributes:
        is_elsewhere: the snapshot is no checkpoint that ``--resume auto`` would find.
    """

    def __init__(
        self,
        config: Config,
        corpus: Prepared,
        run: RunFolder,
        trainer: Trainer,
        checkpoints: CheckpointManager,
        peers: PeerCheckpoints,
        deaths: Deaths,
        bits_depend_on: Mapping[str, str],
        replicates: bool,
    ) -> None:
        self._config, self._corpus, self._run, self._trainer = config, corpus, run, trainer
        self._comm = trainer.comm
        self._checkpoints, self._peers, self._deaths = checkpoints, peers, deaths
        self._bits_depend_on, self._replicates = bits_depend_on, replicates
        self.is_elsewhere = False

    def __call__(self) -> None:
        """Restore the latest snapshot after deaths, otherwise what ``--resume`` means; or start at step 0.

        Raises:
            CheckpointError: no checkpoint is valid, or one is of another run.
        """
        if self._deaths.restarts:
            self._after_deaths()
        elif self._config.resume == "never":
            on_root(self._comm, self._run.set_aside)
            self._initialize()
        elif self._config.resume != "auto":
            self._from_named(self._before_reading)
        elif not self._recovered([self._checkpoints], self._before_reading):
            on_root(self._comm, lambda: self._run.drop_metrics_after(-1, set_aside=True))
            self._initialize()

    def _after_deaths(self) -> None:
        self._run.be_first(self._comm)
        on_root(self._comm, self._corpus.check_unchanged)  # still mapped, so that not all of it is read
        if self._recovered([self._peers, self._checkpoints], self._before_restart):
            return
        if self._config.resume in ("auto", "never"):
            self._report_restart("step 0")
            on_root(self._comm, lambda: self._run.drop_metrics_after(-1))
            self._initialize()
        else:
            self._report_restart(self._config.resume)
            self._from_named(lambda source: faults.at("load"))

    def _initialize(self) -> None:
        """Begin at step 0, with the weights of ``--init-from`` if there are any."""
        if self._config.init_from:
            initialize(self._trainer, self._config, self._corpus)

    def _recovered(
        self, sources: Sequence[SnapshotSource], turn_to: Callable[[SnapshotSource], object]
    ) -> bool:
        found = recover(sources, self._trainer, check=self._check, turn_to=turn_to)
        if found is not None:
            self._report(found.source.where(found.step))
        return found is not None

    def _from_named(self, before_reading: Callable[[SnapshotSource], object]) -> None:
        """Resume from a checkpoint, or from the newest of another run, that ``--resume`` names."""
        wanted = Path(self._config.resume)
        if on_root(self._comm, lambda: os.path.lexists(wanted / "manifest.json")):
            before_reading(CheckpointReader(wanted.parent))
            state_dict.restore(self._trainer, wanted, self._check)  # no older one instead, if it is damaged
            path = wanted
        else:
            source = CheckpointReader(wanted / "checkpoints")
            found = recover([source], self._trainer, check=self._check, turn_to=before_reading)
            if found is None:
                raise CheckpointError(f"--resume {wanted}: neither a checkpoint nor a run folder with one")
            path = Path(source.where(found.step))
        first = not self._deaths.restarts
        self.is_elsewhere = on_root(self._comm, lambda: self._is_elsewhere(path))
        if first:
            on_root(self._comm, lambda: self._leave_other_timeline(path))
        self._report(str(path), set_aside=first)

    def _report(self, where: str, set_aside: bool = False) -> None:
        """Remove later rows of metrics, and say from where the training resumes."""
        step = self._trainer.step
        on_root(self._comm, lambda: self._run.drop_metrics_after(step, set_aside))
        LOG.info(f"resumed at step {step} from {where}")

    def _before_reading(self, source: SnapshotSource) -> None:
        on_root(self._comm, self._corpus.verify)
        faults.at("load")

    def _before_restart(self, source: SnapshotSource) -> None:
        if source is self._peers:
            self._report_restart("peer copies in memory")
        else:
            self._report_restart("the newest checkpoint")
            faults.at("load")

    def _report_restart(self, origin: str) -> None:
        dead = self._deaths.newest
        why = f"{named(dead)} died" if dead else "an exchange failed although no rank died"
        lost = ""
        if self._replicates and self._peers.complete is None:
            lost = " (peer copies were lost as well)"
        size = self._comm.size
        LOG.warning(f"{why}: {counted(size)} restart{'s' * (size == 1)} from {origin}{lost}")

    def _is_elsewhere(self, source: Path) -> bool:
        own = store.path_of(self._run.checkpoints, self._trainer.step)
        return source.resolve().parent != own.parent.resolve() or source.name != own.name

    def _leave_other_timeline(self, source: Path) -> None:
        """Set aside what the run folder has of steps that will be repeated; on rank 0.

        ``--resume auto`` then continues this timeline, not the one that was left.

        Args:
            source: the checkpoint that was restored.
        """
        folder = self._run.checkpoints
        if source.resolve().parent != folder.resolve():
            self._run.set_aside()
            return
        own = folder / source.name
        if count := set_aside_after(folder, self._trainer.step, own):
            LOG.info(f"{count} checkpoints of later steps are now left-step-* in {folder}")
        if not self.is_elsewhere:
            shards.point_to(own, "latest")

    def _check(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` unless a checkpoint is of this run; on rank 0."""
        check_facts(facts, path)
        content = self._corpus.meta["content_sha256"]
        state_dict.check_same_run(facts, self._config, content)
        changed = changes(facts.get("bits_depend_on", {}), self._bits_depend_on)
        if changed:
            LOG.warning(
                "resuming where last bits may differ, for these have changed: " + "; ".join(changed)[:2000]
            )
