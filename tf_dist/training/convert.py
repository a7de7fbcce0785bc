"""Weights of a run for other programs, and theirs for a run: safetensors, and Keras's own files of weights.

Out of a foreign file come arrays, never a model: the model is built by our own code from a run's
``config.yaml``, and each array has to fit the weight that it is for. Of a ``.keras`` archive only the weights
are read; its description of a model, which could name any code, is not looked at. What Keras writes is of
stock layers (`tf_dist.models.stock`), so that Keras opens it alone.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tf_dist.atomic_io import replaced
from tf_dist.errors import BackendMissing, CheckpointError, UsageError
from tf_dist.untrusted_files import opened

if TYPE_CHECKING:
    import keras

    from tf_dist.training.load import LoadedRun

SAFETENSORS, WEIGHTS_H5, KERAS = ".safetensors", ".weights.h5", ".keras"
# What ends so is a file of weights; anything else a run.
KINDS = (SAFETENSORS, WEIGHTS_H5, KERAS)
# A file may hold the state of an optimizer as well; what is larger than this is none of this model.
MOST_TIMES, SLACK_BYTES = 4, 64 << 20
# Logits of a rebuilt model differ by rounding: relative to the largest of them, or to 1.
SAME = 1e-5


def is_file_of_weights(path: Path) -> bool:
    """Whether a name ends as files of weights do."""
    return path.name.endswith(KINDS)


def convert(source: Path, target: Path, which: str = "latest", model: str = "") -> str:
    """Write the weights of a run to a file, or those of a file into a new run; what was done.

    Args:
        source: a run's folder, or a file of weights.
        target: a file of weights, or the folder of a run which has a config.yaml and no checkpoints.
        which: checkpoint of a run: ``latest``, ``best`` or a path.
        model: ``package.module:function`` that makes the model of the run, where that is a user's.

    Raises:
        UsageError: neither or both are files of weights.
        BackendMissing: the package safetensors is needed, and not there.
        CheckpointError: something cannot be read or written, or the file is of another model.
    """
    if is_file_of_weights(source) == is_file_of_weights(target):
        raise UsageError(
            f"convert {source} {target}: one of them must be a run's folder, the other a file that ends in "
            f"{', '.join(KINDS)}"
        )
    if is_file_of_weights(source):
        return _to_run(source, target, model)
    return _to_file(source, target, which, model)


def _to_file(run_dir: Path, path: Path, which: str, model: str) -> str:
    from tf_dist.training.load import load_run

    run = load_run(str(run_dir), which=which, model=model)
    ending = next(kind for kind in KINDS if path.name.endswith(kind))
    note = ""
    with replaced(path, CheckpointError, ending) as temporary:
        if path.name.endswith(SAFETENSORS):
            _safetensors().save_file(named(run.model), temporary, {"format": "np", "step": str(run.step)})
        else:
            note = _save_by_keras(run, temporary, ending)
        with opened(temporary, follow=False) as file:
            os.fsync(file.fileno())
    return f"{len(run.model.weights)} weights of step {run.step} are in {path}{note}"


def _save_by_keras(run: LoadedRun, path: Path, ending: str) -> str:
    """Write a file of stock layers, which Keras opens without tf_dist; a note for the reader.

    Raises:
        UsageError: Keras cannot describe a user's model.
        CheckpointError: what was rebuilt does not compute what the run's model does.
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
    """The model in stock layers, or None where Keras has no graph of it."""
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


def _to_run(path: Path, run_dir: Path, model: str) -> str:
    """Save a checkpoint of step 0, with a fresh optimizer."""
    from tf_dist.training import state
    from tf_dist.training.load import model_of_run

    run = model_of_run(str(run_dir), model)
    checkpoints = run_dir / "checkpoints"
    if checkpoints.exists() and any(checkpoints.iterdir()):
        raise CheckpointError(
            f"{checkpoints} is not empty, and a checkpoint of step 0 would stand behind what is there. Copy "
            "config.yaml and tokenizer.json to a new folder, and convert into that"
        )
    read(path, run.model)
    state.save(_trainer_of(run), checkpoints, 1, _facts(run))
    return f"{len(run.model.weights)} weights of {path} are in {checkpoints}, as step 0 of a new run"


def read(path: Path, model: keras.Model) -> None:
    """Give a model the weights of a file.

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
    except Exception as error:  # whatever the readers of these formats raise
        raise CheckpointError(
            f"{path} does not hold the weights of this model: {_first_line(error)}"
        ) from error


def _read_by_keras(path: Path, model: keras.Model) -> None:
    """Read a file of stock layers; or, as older versions wrote it, of the layers of this model.

    Of a .keras archive only the weights are read, and of HDF5 what a file of weights needs.
    """
    from tf_dist.training import hdf5_weights

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
    """`stock_model`; None also where a user's layers cannot be made from their configuration."""
    from tf_dist.models.stock import stock_model

    try:
        return stock_model(model)
    except Exception:  # whatever a user's get_config raises; a .keras file is then refused, by its reason
        return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def named(model: keras.Model) -> dict[str, np.ndarray]:
    """The weights of a model by path, each of which only one of them has."""
    found = {variable.path: np.asarray(variable.value) for variable in model.weights}
    if len(found) < len(model.weights):
        raise CheckpointError("two weights of this model have one path: give its layers different names")
    return found


def _read_safetensors(path: Path, model: keras.Model) -> None:
    wanted = {variable.path: variable for variable in model.weights}
    with _safetensors(".").safe_open(path, framework="np") as file:
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


def _safetensors(module: str = ".numpy") -> Any:
    import importlib

    try:
        return importlib.import_module("safetensors" + module.rstrip("."))
    except ImportError as error:
        raise BackendMissing("files of safetensors need a package: pip install safetensors") from error


def _trainer_of(run: LoadedRun) -> Any:
    """One process that would train this run."""
    from tf_dist.comm.base import SerialComm
    from tf_dist.training import optimizers
    from tf_dist.training.trainer import Trainer

    config = run.config
    optimizer = optimizers.build(config, run.model, config.steps or 1)
    return Trainer(
        run.model, optimizer, SerialComm(), global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_rows, seq_len=config.seq_len, seed=config.seed, autotune="off",
    )  # fmt: skip


def _facts(run: LoadedRun) -> dict[str, Any]:
    """What a job's checkpoints have. Of data nothing is known: any will do."""
    from tf_dist.comm.agree import versions
    from tf_dist.training.environment import bits_depend_on

    return {
        "config": run.config.as_dict(), "content_sha256": None, "versions": versions(),
        "bits_depend_on": bits_depend_on(), "val_loss": None,
    }  # fmt: skip
