"""Converts weights between a run and other programs: safetensors, and Keras's own weight files.

A foreign file yields arrays, never a model: the model is built by our own code from a run's ``config.yaml``,
and each array must fit its weight. Of a ``.keras`` archive only the weights are read, not its model
configuration, which could name any code. Files for Keras contain stock layers (`tf_dist.models.stock`), so
that Keras opens them without tf_dist.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tf_dist.atomic_io import replaced
from tf_dist.checkpoint.safetensors_package import safetensors_package
from tf_dist.errors import BackendMissing, CheckpointError, UsageError
from tf_dist.untrusted_files import opened

if TYPE_CHECKING:
    import keras

    from tf_dist.run.load_run import LoadedRun
    from tf_dist.training.trainer import Trainer

SAFETENSORS, WEIGHTS_H5, KERAS = ".safetensors", ".weights.h5", ".keras"
# Suffixes of weight files; anything else is a run.
KINDS = (SAFETENSORS, WEIGHTS_H5, KERAS)
# A file may hold optimizer state as well; a larger one is not of this model.
MOST_TIMES, SLACK_BYTES = 4, 64 << 20
# Logits of a rebuilt model differ by rounding; relative to the largest of them, or to 1.
SAME = 1e-5


def is_file_of_weights(path: Path) -> bool:
    """Whether the suffix is that of a weight file."""
    return path.name.endswith(KINDS)


def convert(source: Path, target: Path, which: str = "latest", model: str = "", task: str = "") -> str:
    """Write the weights of a run to a file, or those of a file to a new run; returns a message.

    Args:
        source: a run folder, or a weight file.
        target: a weight file, or a run folder with a config.yaml and no checkpoints.
        which: checkpoint of a run: ``latest``, ``best`` or a path.
        model: ``package.module:function`` that builds the model of the run, if it is a user's.
        task: ``package.module:Task`` of the run, if it is a user's.

    Raises:
        UsageError: neither or both are weight files.
        BackendMissing: the package safetensors is needed and missing.
        CheckpointError: a file cannot be read or written, or is of another model.
    """
    if is_file_of_weights(source) == is_file_of_weights(target):
        raise UsageError(
            f"convert {source} {target}: one of them must be a run's folder, the other a file that ends in "
            f"{', '.join(KINDS)}"
        )
    if is_file_of_weights(source):
        return _to_run(source, target, model, task)
    return _to_file(source, target, which, model, task)


def _to_file(run_dir: Path, path: Path, which: str, model: str, task: str) -> str:
    from tf_dist.run.load_run import load_run, without_adapters

    run = without_adapters(load_run(str(run_dir), which, model, task))
    ending = next(kind for kind in KINDS if path.name.endswith(kind))
    note = ""
    with replaced(path, CheckpointError, ending) as temporary:
        if path.name.endswith(SAFETENSORS):
            safetensors_package().save_file(
                named(run.model), temporary, {"format": "np", "step": str(run.step)}
            )
        else:
            note = _save_by_keras(run, temporary, ending)
        with opened(temporary, follow=False) as file:
            os.fsync(file.fileno())
    return f"{len(run.model.weights)} weights of step {run.step} are in {path}{note}"


def _save_by_keras(run: LoadedRun, path: Path, ending: str) -> str:
    """Write a file of stock layers, which Keras opens without tf_dist; returns a note for the message.

    Raises:
        UsageError: Keras cannot describe a user's model.
        CheckpointError: the rebuilt model computes other logits than the run's.
    """
    import keras

    from tf_dist.models.stock import not_stock

    stock = _rebuilt(run.model)
    model = run.model if stock is None else stock
    if ending == WEIGHTS_H5:
        model.save_weights(path)
        return "" if stock is None else ", under the names of stock Keras layers"
    try:
        foreign = not_stock(model)
        if foreign:  # without get_config they would be saved, and never read again
            with keras.saving.custom_object_scope({one.__name__: one for one in foreign}):
                type(model).from_config(model.get_config())
        model.save(path)
    except Exception as error:  # whatever a user's get_config, or Keras, raises
        raise UsageError(
            f"Keras cannot describe model {run.config.model} in a {KERAS} file ({_first_line(error)}). Its "
            f"weights can be saved: convert to a file that ends in {WEIGHTS_H5} or {SAFETENSORS}, and load "
            "them into the model that your code builds. Or give its classes get_config and from_config "
            "(https://keras.io/guides/serialization_and_saving)"
        ) from error
    if not foreign:
        return "; keras.models.load_model opens it, without tf_dist"
    names = ", ".join(f"{one.__module__}.{one.__name__}" for one in foreign)
    return f"; keras.models.load_model opens it where custom_objects has {names}"


def _rebuilt(model: keras.Model) -> keras.Model | None:
    """The model in stock layers; None if Keras has no graph of it."""
    from tf_dist.models.stock import difference

    stock = _stock(model)
    if stock is None or model.compute_dtype != "float32":  # in fewer bits two orders of sums differ visibly
        return stock
    if (found := difference(model, stock)) > SAME:
        raise CheckpointError(
            f"the model in stock Keras layers computes other logits than the run's (by {found:.1e}): nothing "
            f"is written. Convert to {SAFETENSORS}, and report this"
        )
    return stock


def _to_run(path: Path, run_dir: Path, model: str, task: str) -> str:
    """Save a checkpoint of step 0, with a fresh optimizer."""
    from tf_dist.run.load_run import model_of_run
    from tf_dist.training import state_dict

    run = model_of_run(str(run_dir), model, task)
    checkpoints = run_dir / "checkpoints"
    if checkpoints.exists() and any(checkpoints.iterdir()):
        raise CheckpointError(
            f"{checkpoints} is not empty, and a checkpoint of step 0 would stand behind what is there. Copy "
            "config.yaml and tokenizer.json to a new folder, and convert into that"
        )
    read(path, run.model)
    state_dict.save(_trainer_of(run), checkpoints, 1, _facts(run))
    return f"{len(run.model.weights)} weights of {path} are in {checkpoints}, as step 0 of a new run"


def read(path: Path, model: keras.Model) -> None:
    """Set the weights of a model to those of a file.

    Raises:
        CheckpointError: it cannot be read, or does not hold the weights of this model.
    """
    try:
        opened(path, follow=True).close()  # libraries would wait for a named pipe
        if path.name.endswith(SAFETENSORS):
            _read_safetensors(path, model)
        else:
            _read_by_keras(path, model)
    except (BackendMissing, MemoryError):
        raise
    except Exception as error:  # anything that readers of these formats raise
        raise CheckpointError(
            f"{path} does not hold the weights of this model: {_first_line(error)}"
        ) from error


def read_layers(path: Path, model: keras.Model) -> tuple[set[str], list[str]]:
    """Set the weights of those layers of a model that a file by Keras has, matched by name.

    Args:
        path: a ``.weights.h5`` or ``.keras`` file.
        model: built, with values.

    Returns:
        The names of these layers, and of layers that only the file has.

    Raises:
        CheckpointError: it uses features that no file of weights needs, or is too large.
        ValueError: a layer has other weights, or shapes.
    """
    from tf_dist.checkpoint import hdf5_weights
    from tf_dist.models.stock import take

    bytes_of_model = sum(math.prod(variable.shape) * 8 for variable in model.variables)
    stock = _stock(model)
    written = model if stock is None else stock
    with (
        hdf5_weights.checked(path, MOST_TIMES * bytes_of_model + SLACK_BYTES) as sound,
        tempfile.TemporaryDirectory(prefix="tf_dist-") as folder,
    ):
        # A file of the whole model, in which layers that both have are replaced: Keras reads it by itself.
        whole = Path(folder) / f"model{WEIGHTS_H5}"
        written.save_weights(whole)
        found, left = hdf5_weights.replace_layers(whole, sound)
        written.load_weights(whole)
    if stock is not None:
        take(model, stock)
    return found, left


def _read_by_keras(path: Path, model: keras.Model) -> None:
    """Read a file of stock layers or, from older versions, of this model's layers.

    Of a .keras archive only the weights are read, and of HDF5 only the features that weight files need.
    """
    from tf_dist.checkpoint import hdf5_weights

    bytes_of_model = sum(math.prod(variable.shape) * 8 for variable in model.variables)
    with hdf5_weights.checked(path, MOST_TIMES * bytes_of_model + SLACK_BYTES) as sound:
        _load_weights(sound, model)


def _load_weights(path: Path, model: keras.Model) -> None:
    from tf_dist.models.stock import take

    stock = _stock(model)
    if stock is None:
        model.load_weights(path)
        return
    try:
        stock.load_weights(path)
    except Exception as error:
        try:
            model.load_weights(path)
        except Exception:  # the error that counts is that of the form that is written today
            raise error from None
        return
    take(model, stock)


def _stock(model: keras.Model) -> keras.Model | None:
    """`stock_model`; None also if a user's layers cannot be built from their configuration."""
    from tf_dist.models.stock import stock_model

    try:
        return stock_model(model)
    except Exception:  # whatever a user's get_config raises; a .keras file is then refused, by its reason
        return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def named(model: keras.Model) -> dict[str, np.ndarray]:
    """The weights of a model by path; paths must be unique."""
    found = {variable.path: np.asarray(variable.value) for variable in model.weights}
    if len(found) < len(model.weights):
        raise CheckpointError("two weights of this model have one path: give its layers different names")
    return found


def _read_safetensors(path: Path, model: keras.Model) -> None:
    wanted = {variable.path: variable for variable in model.weights}
    with safetensors_package(".").safe_open(path, framework="np") as file:
        there = set(file.keys())
        if there != set(wanted):
            more, less = sorted(there - set(wanted)), sorted(set(wanted) - there)
            raise ValueError(
                f"lacks {', '.join(less[:3]) or 'none'}; has besides {', '.join(more[:3]) or 'none'}"
            )
        for name, variable in wanted.items():  # all shapes, before anything is changed
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(variable.shape):
                raise ValueError(f"{name} is {list(shape)}, and {list(variable.shape)} is wanted")
        for name, variable in wanted.items():
            variable.assign(file.get_tensor(name))


def _trainer_of(run: LoadedRun) -> Trainer:
    """A trainer of this run, on one process."""
    from tf_dist.comm.transport.base import SerialComm
    from tf_dist.optim import optimizers
    from tf_dist.training.model import words_of_a_row
    from tf_dist.training.trainer import Trainer

    config = run.config
    optimizer = optimizers.build(config, run.model, config.steps or 1)
    return Trainer(
        run.model, optimizer, SerialComm(), global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_rows, seq_len=words_of_a_row(config), seed=config.seed,
        autotune="off",
    )  # fmt: skip


def _facts(run: LoadedRun) -> dict[str, Any]:
    """The facts of a job's checkpoint; its data is unknown, and any is accepted."""
    from tf_dist.comm.runtime.consensus import versions
    from tf_dist.run.numerics_environment import bits_depend_on

    return {
        "config": run.config.as_dict(), "content_sha256": None, "versions": versions(),
        "bits_depend_on": bits_depend_on(), "val_loss": None,
    }  # fmt: skip
