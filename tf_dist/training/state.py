"""A trainer's state as named arrays and facts, and back: what a checkpoint keeps.

Kept: the weights, the optimizer, the step (which is the position in the data), the tokens seen. The
order of the data and dropout are functions of (seed, step), so they need no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist.comm.agree import on_root
from tf_dist.config import Config
from tf_dist.errors import CheckpointError
from tf_dist.run_options import renamed
from tf_dist.training import checkpoint
from tf_dist.training.checked_facts import check_position
from tf_dist.training.manifest import read_manifest
from tf_dist.training.saving import Saver
from tf_dist.training.strategy_state import REMEMBERED
from tf_dist.training.trainer import Trainer
from tf_dist.training.whole import Entry

WEIGHTS = "weights/"
# Of an option in a message: it may be anybody's.
LONGEST_SHOWN = 300
# Options that must not change on resume; a mismatch is an error. All others may.
FIXED = (
    "model", "layers", "width", "heads", "seq_len", "tie_embeddings", "vocab_size", "global_batch_size",
    "seed", "optimizer",
)  # fmt: skip
# Where a run is kept and how it is shown does not matter at all.
FREE = (
    "run_dir",
    "resume",
    "save_every",
    "async_save",
    "keep",
    "log_every",
    "progress",
    "prepared_dir",
    "threads_per_rank",
    "check_every",
    "min_ranks",
    "replicate",
    "max_bad_steps",
    "on_mismatch",
    "stall_warn",
    "stall_abort",
    "autotune",
    # How ranks share the work: a checkpoint knows nothing of it.
    "tensor_parallel",
    "pipeline_parallel",
    "sequence_parallel",
    "pipeline_schedule",
    "pipeline_cuts",
    "virtual_stages",
    "micro_batches_in_flight",
    "recompute",
    "zero_stage",
)


def save(trainer: Trainer, folder: Path, keep: int, facts: Mapping[str, Any]) -> None:
    """Write a checkpoint and remove the oldest; all ranks wait until it is safe. A collective.

    Raises:
        CheckpointError: it could not be written.
    """
    Saver(trainer, folder, keep, background=False).save(facts)


def restore(trainer: Trainer, path: Path) -> None:
    """Read a checkpoint on rank 0 and give every rank what it holds of it.

    Raises:
        CheckpointError: it is damaged, or does not hold this model and optimizer.
    """
    whole = trainer.whole()

    def check() -> list[Any]:
        manifest = read_manifest(path)
        check_position(manifest["facts"], path)
        matching(manifest["tensors"], whole.entries, str(path))  # before anything of foreign size is read
        checkpoint.verify(path)
        return [manifest["step"], manifest["facts"]]

    go_on_at(trainer, *on_root(trainer.comm, check))
    arrays = None
    if trainer.comm.rank == 0:
        arrays = _arrays(path, read_manifest(path), whole.entries)
    whole.take(arrays)


def go_on_at(trainer: Trainer, step: int, facts: Mapping[str, Any]) -> None:
    """Be at a step, by the facts that were kept with it (`position`); all but the tensors."""
    trainer.step, trainer.elapsed_s, trainer.fitted = step, facts["elapsed_s"], 0
    trainer.resume_counting(facts["tokens"])
    tuned = facts.get("tuned", {"xla": False})  # there was no XLA in the first checkpoints
    trainer.tuning.go_on_with(tuned["xla"])


def _arrays(path: Path, manifest: Mapping[str, Any], entries: list[Entry]) -> Iterator[np.ndarray]:
    """The tensors of a checkpoint; zeros for what another strategy would have remembered."""
    saved = checkpoint.read_tensors(path, manifest)
    for entry, number in zip(entries, matching(manifest["tensors"], entries, str(path)), strict=True):
        yield np.zeros(entry.shape, entry.dtype) if number is None else next(saved)[1]


def matching(saved: list[dict[str, Any]], entries: list[Entry], where: str) -> list[int | None]:
    """For each tensor of a trainer which of those that were kept it is.

    Args:
        saved: name, shape and dtype of each, in order; what strategies remember comes last.
        entries: of the trainer.
        where: it was kept.

    Returns:
        Numbers in ``saved``, ascending from 0; None for what another strategy would have remembered.

    Raises:
        CheckpointError: they are of another model or optimizer.
    """
    _check_fits(saved, entries, where)
    found = [(_kind(one["name"]), tuple(one["shape"])) for one in saved]
    same_strategy = found == [(_kind(entry.name), entry.shape) for entry in entries]
    return [
        number if same_strategy or not entry.name.startswith(REMEMBERED) else None
        for number, entry in enumerate(entries)
    ]


def _kind(name: str) -> str:
    """What stays of a tensor's name where Keras numbers layers anew in every process."""
    return name.split("/")[1] if name.startswith(REMEMBERED) else ""


def _check_fits(saved: list[dict[str, Any]], entries: list[Entry], where: str) -> None:
    # By place, not by name: Keras numbers layers anew in every process. A run may go on with another
    # strategy.
    saved = [tensor for tensor in saved if not tensor["name"].startswith(REMEMBERED)]
    entries = [entry for entry in entries if not entry.name.startswith(REMEMBERED)]
    found = [(tuple(tensor["shape"]), tensor["dtype"]) for tensor in saved]
    if found != [(entry.shape, entry.dtype) for entry in entries]:
        raise CheckpointError(
            f"{where} holds {len(found)} tensors that are not the {len(entries)} of this model and "
            "optimizer. Give the options it was made with, or start anew with --resume never"
        )


def load_weights(model: Any, path: Path) -> int:
    """Give a model the weights of a checkpoint, without an optimizer; the step it is of.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    manifest = read_manifest(path)
    shapes = [tuple(variable.shape) for variable in model.weights]
    saved = [one for one in manifest["tensors"] if one["name"].startswith(WEIGHTS)]
    if [tuple(one["shape"]) for one in saved] != shapes:  # before anything of foreign size is read
        raise CheckpointError(f"{path} does not hold the weights of this model")
    tensors = checkpoint.read_tensors(path, manifest, WEIGHTS)
    for variable, (_, tensor) in zip(model.weights, tensors, strict=True):
        variable.assign(tensor)
    return int(manifest["step"])


def check_same_run(
    saved: Mapping[str, Any], config: Config, content_sha256: str, say: Callable[[str], None]
) -> None:
    """Refuse to go on from another run's checkpoint; say which options have changed.

    Args:
        saved: the facts of the checkpoint.
        config: of this run, with the tokenizer's vocab_size.
        content_sha256: of this run's tokens.
        say: takes the note.

    Raises:
        CheckpointError: the model, the data or the batches are others.
    """
    # Options missing from an older checkpoint take their default, which is what that version did.
    before, now = {**Config().as_dict(), **renamed(saved["config"])}, config.as_dict()
    # Weights that came from elsewhere know of no data.
    before["data's SHA-256"], now["data's SHA-256"] = (
        saved["content_sha256"] or content_sha256,
        content_sha256,
    )
    changed = [key for key in now if before.get(key) != now[key] and key not in FREE]
    lines = {key: f"{key}: {str(before.get(key))[:LONGEST_SHOWN]} -> {now[key]}" for key in changed}
    fatal = [lines[key] for key in changed if key in FIXED or key == "data's SHA-256"]
    if fatal:
        raise CheckpointError(
            "the checkpoint is of another run:\n  " + "\n  ".join(fatal) + "\n"
            "Give the same options, or start anew with --resume never or another --run-dir"
        )
    if changed:
        say("resuming with changed options: " + "; ".join(lines.values()))
