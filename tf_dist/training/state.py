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
from tf_dist.training import checkpoint
from tf_dist.training.manifest import read_manifest
from tf_dist.training.meeting import REMEMBERED
from tf_dist.training.saving import Saver
from tf_dist.training.trainer import Trainer
from tf_dist.training.whole import Entry

# A checkpoint of another value for one of these is of another run. The rest may change on resume.
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
        manifest = checkpoint.verify(path)
        _check_fits(manifest["tensors"], whole.entries, path)
        facts = manifest["facts"]
        tuned = facts.get("tuned", {"xla": False})  # there was no XLA in the first checkpoints
        return [manifest["step"], facts["tokens"], facts["elapsed_s"], tuned]

    trainer.step, tokens, trainer.elapsed_s, tuned = on_root(trainer.comm, check)
    trainer.resume_counting(tokens)
    trainer.tuning.go_on_with(tuned["xla"])
    arrays = None
    if trainer.comm.rank == 0:
        manifest = read_manifest(path)
        arrays = _arrays(path, manifest, whole.entries)
    whole.take(arrays)


def _arrays(path: Path, manifest: Mapping[str, Any], entries: list[Entry]) -> Iterator[np.ndarray]:
    """The tensors of a checkpoint; zeros for what another update would have remembered."""
    saved = checkpoint.read_tensors(path, manifest)
    same = _same_update(manifest["tensors"], entries)
    for entry in entries:
        if same or not entry.name.startswith(REMEMBERED):
            yield next(saved)[1]
        else:
            yield np.zeros(entry.shape, entry.dtype)


def _same_update(saved: list[dict[str, Any]], entries: list[Entry]) -> bool:
    """Whether the update of a checkpoint has remembered what this one does."""
    found = [(_kind(one["name"]), tuple(one["shape"])) for one in saved]
    wanted = [(_kind(entry.name), entry.shape) for entry in entries]
    return found == wanted


def _kind(name: str) -> str:
    """What stays of a tensor's name where Keras numbers layers anew in every process."""
    return name.split("/")[1] if name.startswith(REMEMBERED) else ""


def _check_fits(saved: list[dict[str, Any]], entries: list[Entry], path: Path) -> None:
    # By place, not by name: Keras numbers layers anew in every process. A run may go on with another update.
    saved = [tensor for tensor in saved if not tensor["name"].startswith(REMEMBERED)]
    entries = [entry for entry in entries if not entry.name.startswith(REMEMBERED)]
    found = [(tuple(tensor["shape"]), tensor["dtype"]) for tensor in saved]
    if found != [(entry.shape, entry.dtype) for entry in entries]:
        raise CheckpointError(
            f"{path} holds {len(found)} tensors that are not the {len(entries)} of this model and optimizer. "
            "Give the options it was made with, or start anew with --resume never"
        )


def load_weights(model: Any, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Give a model the weights of a checkpoint, without an optimizer.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    saved = [tensor for name, tensor in tensors.items() if name.startswith("weights/")]
    shapes = [tuple(variable.shape) for variable in model.weights]
    if [tensor.shape for tensor in saved] != shapes:
        raise CheckpointError(f"{path} does not hold the weights of this model")
    for variable, tensor in zip(model.weights, saved, strict=True):
        variable.assign(tensor)


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
    # An option that the checkpoint does not have is newer than it: what it did was the default.
    before, now = {**Config().as_dict(), **saved["config"]}, config.as_dict()
    # Weights that came from elsewhere know of no data.
    before["data's SHA-256"], now["data's SHA-256"] = (
        saved["content_sha256"] or content_sha256,
        content_sha256,
    )
    changed = [key for key in now if before.get(key) != now[key] and key not in FREE]
    lines = {key: f"{key}: {before.get(key)} -> {now[key]}" for key in changed}
    fatal = [lines[key] for key in changed if key in FIXED or key == "data's SHA-256"]
    if fatal:
        raise CheckpointError(
            "the checkpoint is of another run:\n  " + "\n  ".join(fatal) + "\n"
            "Give the same options, or start anew with --resume never or another --run-dir"
        )
    if changed:
        say("resuming with changed options: " + "; ".join(lines.values()))
