"""Loads a finished or running run: its options, tokenizer and model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np

from tf_dist.checkpoint import store
from tf_dist.checkpoint.manifest import read_manifest
from tf_dist.config import Config
from tf_dist.config.fine_tuning import untuned
from tf_dist.data.prepared_dataset import sha256_of_file
from tf_dist.data.tokenizer import Tokenizer, load_tokenizer
from tf_dist.errors import CheckpointError, UsageError
from tf_dist.flags import from_mapping, read_config_file
from tf_dist.invocation import command
from tf_dist.models.lora import merged
from tf_dist.run.status import correct
from tf_dist.run_options import check_named
from tf_dist.training import state_dict
from tf_dist.training.model import build_model


@dataclass(frozen=True)
class LoadedRun:
    """Contents of a run folder; ``content_sha256`` of its tokens is None if unknown."""

    config: Config
    tokenizer: Tokenizer
    model: keras.Model
    step: int
    content_sha256: str | None = None


def load_run(run_dir: str, which: str = "latest", model: str = "", task: str = "") -> LoadedRun:
    """Rebuild the model of a run with the weights of one of its checkpoints.

    The model is built from the run's ``config.yaml`` by our own code, or by the function that it names if the
    caller names it as well; nothing is unpickled and no model file is loaded.

    Args:
        run_dir: folder of the run.
        which: ``latest``, the newest valid one; ``best``, by validation loss; or a path.
        model: ``package.module:function``, whose code may run if the run's model is made by it.
        task: ``package.module:Task``, whose code may run if it is the run's task.

    Raises:
        CheckpointError: the folder holds no run, no checkpoint that can be used, or another tokenizer.
        LaunchError: the run names code that ``model`` or ``task`` does not name.
    """
    folder = Path(run_dir)
    correct(folder)
    config = _config_of(folder, {"model": model, "task": task})
    path = _chosen(folder / "checkpoints", which)
    facts = read_manifest(path)["facts"]
    tokenizer = _tokenizer_of(folder, facts.get("tokenizer_sha256"))
    built = build_model(config)
    step = state_dict.load_weights(built, path)
    return LoadedRun(config, tokenizer, built, step, facts.get("content_sha256"))


def without_adapters(run: LoadedRun) -> LoadedRun:
    """A run with plain weights: LoRA adapters are added to their kernels, and the model has none."""
    config = run.config
    if not config.lora_rank:
        return run
    weights = {variable.path: variable for variable in run.model.weights}
    model, scale = build_model(untuned(config)), config.lora_alpha / config.lora_rank

    def read(path: str) -> np.ndarray:
        return np.asarray(weights[path].value)

    for variable in model.weights:
        variable.assign(merged(variable.path, read, weights, scale))
    return replace(run, model=model)


def model_of_run(run_dir: str, model: str = "", task: str = "") -> LoadedRun:
    """The model of a run before its first step. ``model`` and ``task``: as in `load_run`.

    Raises:
        CheckpointError: the folder holds no run.
        LaunchError: the run names code that ``model`` or ``task`` does not name.
    """
    folder = Path(run_dir)
    config = _config_of(folder, {"model": model, "task": task})
    return LoadedRun(config, _tokenizer_of(folder, None), build_model(config), 0)


def _config_of(folder: Path, named: Mapping[str, str]) -> Config:
    path = folder / "config.yaml"
    if not os.path.lexists(path):
        raise CheckpointError(f"{folder} holds no run (no config.yaml). Train one: {command('train')}")
    config = from_mapping(read_config_file(str(path), follow=False), str(path))
    for option, name in named.items():
        said = str(getattr(config, option))
        check_named(said, name, str(path), option)
        if name and name != said:
            raise UsageError(f"--{option} {name}: the {option} of this run is {said}; leave --{option} out")
    return config


def _tokenizer_of(folder: Path, sha256: object) -> Tokenizer:
    """The tokenizer of a run, verified: another one would map text to other ids.

    Raises:
        CheckpointError: its SHA-256 is not the one in the checkpoint.
    """
    path = folder / "tokenizer.json"
    if sha256 is not None and sha256_of_file(path, follow=False) != sha256:
        raise CheckpointError(
            f"{path} is not the tokenizer that the model was trained with: its SHA-256 is not the one in the "
            "checkpoint. Put it back"
        )
    return load_tokenizer(path, follow=False)


def _chosen(folder: Path, which: str) -> Path:
    if which == "best":
        found = store.best(folder)
        if found is None:
            raise CheckpointError(
                f"{folder} names no best checkpoint: none was saved at a step that was validated. Let "
                "--save-every be a multiple of --eval-every, or use --checkpoint latest"
            )
        return found
    if which != "latest":
        return Path(which)
    newest = store.newest(folder)
    if newest is None:
        raise CheckpointError(
            f"{folder.parent} holds no checkpoint yet: let the run reach its first --save-every"
        )
    return newest
