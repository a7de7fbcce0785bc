"""A trainer's state as named arrays and facts, and back: what a checkpoint keeps.

Kept: the weights, the optimizer, the step (which is the position in the data), the tokens seen. The
order of the data and dropout are functions of (seed, step), so they need no state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_dist.comm.agree import on_root
from tf_dist.config import Config
from tf_dist.errors import CheckpointError
from tf_dist.training import checkpoint
from tf_dist.training.trainer import Trainer

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
    "keep",
    "log_every",
    "progress",
    "prepared_dir",
    "threads_per_rank",
    "check_every",
    "on_mismatch",
    "autotune",
)


def save(trainer: Trainer, folder: Path, keep: int, facts: Mapping[str, Any]) -> None:
    """Write a checkpoint on rank 0 and remove the oldest; the others wait until it is safe.

    Raises:
        CheckpointError: it could not be written.
    """
    if trainer.comm.rank == 0:
        tensors = {name: np.asarray(variable.value) for name, variable in _variables(trainer)}
        position: dict[str, Any] = {"tokens": trainer.tokens, "elapsed_s": trainer.elapsed_s}
        position["tuned"] = {"xla": trainer.replica.xla}
        checkpoint.save(folder, trainer.step, tensors, {**position, **facts})
        checkpoint.prune(folder, keep, trainer.step)
    trainer.comm.barrier()


def restore(trainer: Trainer, path: Path) -> None:
    """Read a checkpoint on rank 0 and give its state to every rank.

    Raises:
        CheckpointError: it does not hold this model and optimizer.
    """
    comm, variables = trainer.comm, _variables(trainer)
    arrays = [np.array(keras.ops.convert_to_numpy(variable)) for _, variable in variables]

    def read() -> list[Any]:
        tensors, facts, step = checkpoint.load(path)
        # By place, not by name: Keras numbers layers anew in every process.
        arrays[:] = [np.array(tensor) for tensor in tensors.values()]
        _check_fits(arrays, variables, path)
        tuned = facts.get("tuned", {"xla": False})  # there was no XLA in the first checkpoints
        return [step, facts["tokens"], facts["elapsed_s"], tuned]

    trainer.step, trainer.tokens, trainer.elapsed_s, tuned = on_root(comm, read)
    trainer.tuning.go_on_with(tuned["xla"])
    for (_, variable), array in zip(variables, arrays, strict=True):
        comm.broadcast(array.reshape(-1))
        variable.assign(array)


def _check_fits(arrays: list[np.ndarray], variables: list[tuple[str, Any]], path: Path) -> None:
    saved = [(array.shape, str(array.dtype)) for array in arrays]
    wanted = [(tuple(variable.shape), variable.dtype) for _, variable in variables]
    if saved != wanted:
        raise CheckpointError(
            f"{path} holds {len(saved)} tensors that are not the {len(wanted)} of this model and optimizer. "
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
    before["data's SHA-256"], now["data's SHA-256"] = saved["content_sha256"], content_sha256
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


def _variables(trainer: Trainer) -> list[tuple[str, Any]]:
    weights = [(f"weights/{i:04d}/{v.path}", v) for i, v in enumerate(trainer.model.weights)]
    state = [(f"optimizer/{i:04d}/{v.path}", v) for i, v in enumerate(trainer.optimizer.variables)]
    return weights + state
