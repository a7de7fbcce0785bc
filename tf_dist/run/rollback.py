"""Rollback of a running training to an earlier checkpoint, from which some batches are skipped."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

from tf_dist.atomic_io import sync_folder
from tf_dist.checkpoint import store
from tf_dist.comm.runtime.consensus import on_root
from tf_dist.run.run_folder import RunFolder
from tf_dist.training.loss_spikes import BEFORE, Spike
from tf_dist.training.snapshot import NoneValid, SnapshotSource, recover
from tf_dist.training.trainer import Trainer

LOG = logging.getLogger(__name__)


def roll_back(checkpoints: SnapshotSource, trainer: Trainer, run: RunFolder, spike: Spike) -> bool:
    """Return to a checkpoint before a spike, and skip batches from there on; a collective.

    Returns:
        Whether there was a valid checkpoint; if not, the training is as before.

    Raises:
        NumericError: that was done too often.
    """
    first = trainer.spikes.batch_after(spike.step)
    try:
        found = recover([checkpoints], trainer, before=spike.step - BEFORE + 1)
    except NoneValid:
        found = None
    if found is None:
        LOG.warning(f"{spike}; no checkpoint is {BEFORE} steps older, so training continues")
        return False
    step = found.step
    count = trainer.spikes.pass_over(spike.step, step, first)
    on_root(trainer.comm, lambda: set_aside_after(run.checkpoints, step))
    run.drop_metrics_after(step)
    LOG.warning(f"{spike}; back to step {step}, and {count} batches from there on are skipped")
    return True


def set_aside_after(folder: Path, step: int, source: Path | None = None) -> int:
    """Rename checkpoints of an abandoned timeline, so that no resume finds them; on rank 0.

    Args:
        folder: of the checkpoints.
        step: checkpoints of later steps are renamed.
        source: the checkpoint that was restored: another one of that very step is renamed as well. None: it
            stays.

    Returns:
        How many were renamed.
    """
    found = [path for path in store.listing(folder) if store.step_of(path) >= step]
    left = [path for path in found if store.step_of(path) > step or (source is not None and path != source)]
    for path in left:
        os.rename(path, path.with_name(f"left-{path.name}-{secrets.token_hex(4)}"))
    sync_folder(folder)
    return len(left)
