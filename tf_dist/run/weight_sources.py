"""Where initial weights come from: checkpoints and weight files, as arrays by the paths of weights.

Nothing is read before it is asked for, but of HDF5 files, whose layers only Keras can tell apart: these are
read into the whole model. The files are untrusted: they yield arrays, never a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist.checkpoint import store
from tf_dist.checkpoint.manifest import read_manifest
from tf_dist.checkpoint.safetensors_package import safetensors_package
from tf_dist.config import Config
from tf_dist.config.fine_tuning import untuned
from tf_dist.errors import BackendMissing, CheckpointError
from tf_dist.huggingface.folder import is_model_folder, left_over, open_folder
from tf_dist.models.lora import A, B, merged
from tf_dist.parallel.sharding import ShardSpec
from tf_dist.run import convert
from tf_dist.untrusted_files import opened, shown

WEIGHTS = "weights/"


@dataclass
class WeightSource:
    """Weights by path; on rank 0.

    shapes: of those that there are. read: one of them. said: where they are, for messages. config: of the
    run that trained them, as its checkpoint has it; empty if not known. left: layers that only the file has,
    where these are known by name. read_shard: a shard of one of them; None: only all of it can be read.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    said: str
    config: Mapping[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    read_shard: Callable[[str, ShardSpec], np.ndarray] | None = None

    @property
    def lora_scale(self) -> float:
        """The scale of its adapters."""
        rank, alpha = self.config.get("lora_rank"), self.config.get("lora_alpha")
        if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
            raise CheckpointError(f"{self.said} has LoRA adapters, and does not say their rank and alpha")
        return float(alpha) / rank

    def without_adapters_but(self, paths: Container[str]) -> WeightSource:
        """These weights, with adapters added to their kernels unless the model (its ``paths``) has them."""
        gone = [path[: -len(A)] for path in self.shapes if path.endswith(A) and path not in paths]
        gone = [path for path in gone if path in self.shapes and path + B in self.shapes]
        if not gone:
            return self
        scale, added = self.lora_scale, {path + A for path in gone}
        kept = {p: s for p, s in self.shapes.items() if p not in added and p not in {q + B for q in gone}}

        def read(path: str) -> np.ndarray:
            return np.asarray(merged(path, self.read, added, scale))

        return WeightSource(
            kept, read, f"{self.said} (its {len(gone)} adapters merged)", self.config, self.left
        )


def open_source(path: Path, config: Config) -> WeightSource:
    """Open a checkpoint, a weight file or a model folder of Hugging Face; on rank 0.

    Args:
        path: pinned (`tf_dist.run.init_from.pinned`).
        config: of the new run: the model that HDF5 files are read into.

    Raises:
        CheckpointError: it is damaged, or cannot be read.
        BackendMissing: the package safetensors is needed and missing.
    """
    if is_model_folder(path):
        return _model_folder(path, config)
    if not convert.is_file_of_weights(path):
        return _checkpoint(path)
    try:
        opened(path, follow=True).close()  # libraries would wait for a named pipe
        if path.name.endswith(convert.SAFETENSORS):
            return _safetensors(path)
        return _keras_file(path, config)
    except (BackendMissing, CheckpointError, MemoryError):
        raise
    except Exception as error:  # anything that readers of these formats raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise CheckpointError(f"--init-from {path}: {reason}") from error


def _checkpoint(path: Path) -> WeightSource:
    store.verify(path)
    checkpoint = store.open_checkpoint(path)
    saved = [one for one in checkpoint.manifest["tensors"] if one["name"].startswith(WEIGHTS)]
    full = {one["name"].split("/", 2)[-1]: one["name"] for one in saved}
    shapes = {one["name"].split("/", 2)[-1]: tuple(one["shape"]) for one in saved}
    if len(full) < len(saved):
        raise CheckpointError(f"--init-from {path}: two of its weights have one path, so no name is certain")

    def read(name: str) -> np.ndarray:
        return next(store.read_tensors(checkpoint, full[name]))[1]

    config = read_manifest(path)["facts"].get("config")
    return WeightSource(shapes, read, str(path), config if isinstance(config, dict) else {})


def _model_folder(path: Path, config: Config) -> WeightSource:
    folder = open_folder(path, config)
    shapes = {name: folder.shape(name) for name in folder.ours}
    known = {name: getattr(config, name) for name in ("model", "heads", "layers", "width", "seq_len")}
    return WeightSource(shapes, folder.read, str(path), known, left_over(folder), folder.read)


def _safetensors(path: Path) -> WeightSource:
    with safetensors_package(".").safe_open(path, framework="np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}

    def read(name: str) -> np.ndarray:
        with safetensors_package(".").safe_open(path, framework="np") as file:
            return np.asarray(file.get_tensor(name))

    return WeightSource(shapes, read, str(path))


def _keras_file(path: Path, config: Config) -> WeightSource:
    """A file by Keras: its layers are read into a whole model without adapters, by their names."""
    from tf_dist.models.build import build

    model = build(untuned(config))
    layers, left = convert.read_layers(path, model)
    arrays = {name: one for name, one in convert.named(model).items() if name.split("/")[0] in layers}
    if not all(math.prod(one.shape) for one in arrays.values()):
        raise CheckpointError(f"--init-from {path}: {shown(path.name)} has empty arrays")
    return WeightSource(
        {n: tuple(a.shape) for n, a in arrays.items()}, arrays.__getitem__, str(path), {}, left
    )
