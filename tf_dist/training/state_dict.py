"""Checkpoints of a trainer in one call, the weights of one for a model, and whether it is of this run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from tf_dist.checkpoint import store
from tf_dist.config import Config, on_resume
from tf_dist.errors import CheckpointError
from tf_dist.run_options import renamed
from tf_dist.training.checkpoint_manager import CheckpointManager
from tf_dist.training.checkpoint_reader import restore_from
from tf_dist.training.snapshot import Check, snapshot_of
from tf_dist.training.train_state import Stateful

LOG = logging.getLogger(__name__)
WEIGHTS = "weights/"
# Of an option in a message: its value may come from an untrusted file.
LONGEST_SHOWN = 300


def save(trainer: Stateful, folder: Path, keep: int, facts: Mapping[str, Any]) -> None:
    """Write a checkpoint and remove the oldest; returns when it is on disk. A collective.

    Args:
        trainer: whose state is saved.
        folder: of the checkpoints.
        keep: newest ones kept.
        facts: JSON values to be kept with it.

    Raises:
        CheckpointError: it could not be written; on all ranks.
    """
    trainer.gather_state()
    CheckpointManager(trainer.comm, folder, keep, background=False).save(snapshot_of(trainer, facts))


def restore(trainer: Stateful, path: Path, check: Check | None = None) -> int:
    """Restore one checkpoint; a collective. Each byte is read once, by rank 0.

    Args:
        trainer: receives the state.
        path: of the checkpoint.
        check: as in `SnapshotSource.restore`.

    Returns:
        Its step.

    Raises:
        CheckpointError: it is damaged, or of another model, optimizer or run; the trainer is unchanged.
    """
    trainer.state.load_state_dict(restore_from(path, trainer.whole(), check))
    return trainer.state.step


def load_weights(model: keras.Model, path: Path) -> int:
    """Set a model's weights to those of a checkpoint, without an optimizer; returns its step.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    checkpoint = store.open_checkpoint(path)
    manifest = checkpoint.manifest
    shapes = [tuple(variable.shape) for variable in model.weights]
    saved = [one for one in manifest["tensors"] if one["name"].startswith(WEIGHTS)]
    if [tuple(one["shape"]) for one in saved] != shapes:  # before anything of foreign size is read
        raise CheckpointError(f"{path} does not hold the weights of this model")
    tensors = store.read_tensors(checkpoint, WEIGHTS)
    for variable, (_, tensor) in zip(model.weights, tensors, strict=True):
        variable.assign(tensor)
    return int(manifest["step"])


def check_same_run(saved: Mapping[str, Any], config: Config, content_sha256: str) -> None:
    """Refuse to resume from another run's checkpoint; log which options have changed.

    Args:
        saved: the facts of the checkpoint.
        config: of this run, with the tokenizer's vocab_size.
        content_sha256: of this run's tokens.

    Raises:
        CheckpointError: the model, the data or the batches are others.
    """
    # Options missing from an older checkpoint take their default, which is what that version did.
    before, now = {**Config().as_dict(), **renamed(saved["config"])}, config.as_dict()
    # Converted weights have no data.
    before["data's SHA-256"], now["data's SHA-256"] = (
        saved["content_sha256"] or content_sha256,
        content_sha256,
    )
    free = on_resume("free", "of a start")
    changed = [key for key in now if before.get(key) != now[key] and key not in free]
    lines = {key: f"{key}: {str(before.get(key))[:LONGEST_SHOWN]} -> {now[key]}" for key in changed}
    fatal = [lines[key] for key in changed if key in (*on_resume("same"), "data's SHA-256")]
    if fatal:
        raise CheckpointError(
            "the checkpoint is of another run:\n  " + "\n  ".join(fatal) + "\n"
            "Give the same options, or start anew with --resume never or another --run-dir"
        )
    if changed:
        LOG.info("resuming with changed options: " + "; ".join(lines.values()))
