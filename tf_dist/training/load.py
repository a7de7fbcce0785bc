"""A finished or running run, read back: its options, tokenizer and model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras

from tf_dist import terminal
from tf_dist.config import Config
from tf_dist.data.prepared import sha256_of_file
from tf_dist.data.tokenizer import Tokenizer, load_tokenizer
from tf_dist.errors import CheckpointError, UsageError
from tf_dist.flags import from_mapping, read_config_file
from tf_dist.invocation import command
from tf_dist.models.build import build
from tf_dist.run_options import check_named
from tf_dist.training import checkpoint, state
from tf_dist.training.manifest import read_manifest
from tf_dist.training.status import correct


@dataclass(frozen=True)
class LoadedRun:
    """What a run folder holds, ready to use; ``content_sha256`` of its tokens is None where not known."""

    config: Config
    tokenizer: Tokenizer
    model: keras.Model
    step: int
    content_sha256: str | None = None


def load_run(
    run_dir: str, say: Callable[[str], object] = terminal.write, which: str = "latest", model: str = ""
) -> LoadedRun:
    """Rebuild the model of a run and give it the weights of one of its checkpoints.

    The model is built from the run's ``config.yaml`` by our own code, or by the function that it names where
    the caller names it as well; nothing is unpickled and no model file is loaded.

    Args:
        run_dir: the folder that a job made.
        say: told which checkpoints are passed over because they are damaged.
        which: ``latest``, the newest that is sound; ``best``, by validation loss; or the path of one.
        model: ``package.module:function``, whose code may run if the run's model is made by it.

    Raises:
        CheckpointError: the folder holds no run, no checkpoint that can be used, or another tokenizer.
        LaunchError: the run's model is made by code that ``model`` does not name.
    """
    folder = Path(run_dir)
    correct(folder)
    config = _config_of(folder, model)
    path = _chosen(folder / "checkpoints", which, say)
    facts = read_manifest(path)["facts"]
    tokenizer = _tokenizer_of(folder, facts.get("tokenizer_sha256"))
    built = build(config)
    step = state.load_weights(built, path)
    return LoadedRun(config, tokenizer, built, step, facts.get("content_sha256"))


def model_of_run(run_dir: str, model: str = "") -> LoadedRun:
    """The model of a run as it was before the first step. ``model``: as of `load_run`.

    Raises:
        CheckpointError: the folder holds no run.
        LaunchError: the run's model is made by code that ``model`` does not name.
    """
    folder = Path(run_dir)
    config = _config_of(folder, model)
    return LoadedRun(config, _tokenizer_of(folder, None), build(config), 0)


def _config_of(folder: Path, named: str) -> Config:
    path = folder / "config.yaml"
    if not os.path.lexists(path):
        raise CheckpointError(f"{folder} holds no run (no config.yaml). Train one: {command('train')}")
    config = from_mapping(read_config_file(str(path), follow=False), str(path))
    check_named(config.model, named, str(path))
    if named and named != config.model:
        raise UsageError(f"--model {named}: the model of this run is {config.model}; leave --model out")
    return config


def _tokenizer_of(folder: Path, sha256: object) -> Tokenizer:
    """The tokenizer of a run: another one would give the model ids that mean something else to it.

    Raises:
        CheckpointError: the file is not the one that the checkpoint tells of.
    """
    path = folder / "tokenizer.json"
    if sha256 is not None and sha256_of_file(path, follow=False) != sha256:
        raise CheckpointError(
            f"{path} is not the tokenizer that the model was trained with: its SHA-256 is not the one in the "
            "checkpoint. Put it back"
        )
    return load_tokenizer(path, follow=False)


def _chosen(folder: Path, which: str, say: Callable[[str], object]) -> Path:
    if which == "best":
        found = checkpoint.best(folder)
        if found is None:
            raise CheckpointError(
                f"{folder} names no best checkpoint: none was saved at a step that was validated. Let "
                "--save-every be a multiple of --eval-every, or use --checkpoint latest"
            )
        return found
    if which != "latest":
        return Path(which)
    newest = checkpoint.newest(folder, say)
    if newest is None:
        raise CheckpointError(
            f"{folder.parent} holds no checkpoint yet: let the run reach its first --save-every"
        )
    return newest
