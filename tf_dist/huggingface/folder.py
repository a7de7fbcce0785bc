"""Reads a model folder of Hugging Face: its sizes before any weight, and weights by parts.

A file of weights is checked by its header: every tensor that the model needs, of the shape that
``config.json`` says. Then slices are read as they are asked for, by any rank: no file is ever in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist.checkpoint.safetensors_package import safetensors_package
from tf_dist.config import Config
from tf_dist.errors import CheckpointError
from tf_dist.huggingface.config_json import ModelOfFolder, model_of
from tf_dist.huggingface.families import FAMILIES, Composite, Family, Part
from tf_dist.parallel.sharding import ShardSpec
from tf_dist.untrusted_files import opened, read_json, shown

CONFIG, INDEX, WEIGHTS, TOKENIZER = (
    "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json",
)  # fmt: skip
CONFIG_BYTES, INDEX_BYTES = 1 << 20, 64 << 20
POSITIONS = "positions/positions"
TYPES = ("F32", "F16", "BF16", "F64")
Shape = tuple[int, ...]


def is_model_folder(path: Path) -> bool:
    """Whether a path looks like a model folder, and not like a run."""
    return (path / CONFIG).is_file()


def read_model(path: Path) -> ModelOfFolder:
    """What the ``config.json`` of a folder says, in our options.

    Raises:
        CheckpointError: it cannot be read, or is of a model that this program does not have.
    """
    return model_of(_json(path / CONFIG, CONFIG_BYTES), str(path / CONFIG))


def _json(path: Path, limit_bytes: int) -> dict[str, Any]:
    try:
        found = read_json(path, limit_bytes, follow=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return found


@dataclass(frozen=True)
class ModelFolder:
    """Weights of a folder, by our paths.

    Args:
        path: of the folder.
        family: of its model.
        files: which file holds each of their tensors.
        shapes: of theirs.
        ours: our weights, by path.
        rows: of a weight of ours, where it has fewer than the folder: positions of shorter rows.
    """

    path: Path
    family: Family
    files: Mapping[str, Path]
    shapes: Mapping[str, Shape]
    ours: Mapping[str, Composite] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)

    def shape(self, path: str) -> Shape:
        """Of one of our weights, as its parts there make it."""
        parts = [self._shape_of(part) for part in self.ours[path].parts]
        whole = (*parts[0][:-1], sum(shape[-1] for shape in parts))
        return (self.rows[path], *whole[1:]) if path in self.rows else whole

    def _shape_of(self, part: Part) -> Shape:
        shape = self.shapes[part.name]
        return shape[::-1] if part.transposed else shape

    def read(self, path: str, shard: ShardSpec | None = None) -> np.ndarray:
        """One of our weights, float32, or a shard of it; nothing else is read.

        Raises:
            CheckpointError: a file is damaged.
        """
        parts = self.ours[path].parts
        if shard is None or shard.ranges is None:
            first = {0: range(self.rows[path])} if path in self.rows else {}
            return self._joined([self._read(part, first) for part in parts])
        last = len(shard.whole) - 1
        if shard.axis != last:
            rows = [
                self._joined([self._read(part, {shard.axis: one}) for part in parts]) for one in shard.ranges
            ]
            return np.concatenate(rows, axis=shard.axis)
        starts = np.cumsum([0, *(self._shape_of(part)[-1] for part in parts)])
        columns = []
        for one in shard.ranges:
            for part, start, stop in zip(parts, starts[:-1], starts[1:], strict=True):
                inside = range(max(one.start, start) - start, min(one.stop, stop) - start)
                if len(inside):
                    columns.append(self._read(part, {last: inside}))
        return self._joined(columns)

    @staticmethod
    def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1))

    def _read(self, part: Part, ranges: Mapping[int, range]) -> np.ndarray:
        """A tensor of theirs in our orientation, of each axis the range that is given."""
        rank = len(self.shapes[part.name])
        index = [slice(None)] * rank
        for axis, one in ranges.items():
            index[rank - 1 - axis if part.transposed else axis] = slice(int(one.start), int(one.stop))
        file = self.files[part.name]
        try:
            with safetensors_package(".").safe_open(file, framework="np") as opened_file:
                array = opened_file.get_slice(part.name)[tuple(index)]
        except (OSError, ValueError, safetensors_package(".").SafetensorError) as error:
            raise CheckpointError(f"{file}: {shown(part.name)} cannot be read: {error}") from error
        array = np.asarray(array, np.float32)
        return array.T if part.transposed else array


def open_folder(path: Path, config: Config) -> ModelFolder:
    """Open the weights of a folder for a model of ours; only headers are read.

    Args:
        path: of the folder.
        config: of the model, with the options that `read_model` found.

    Raises:
        CheckpointError: a shard or a tensor is missing, one has another shape, or a header is damaged.
        BackendMissing: the package safetensors is missing.
    """
    model = read_model(path)
    family = FAMILIES[model.family]
    files, shapes = _headers(path)
    ours: dict[str, Composite] = {}
    for composite in family.names(config):
        parts = tuple(
            Part(_found(part.name, files, family, path), part.transposed) for part in composite.parts
        )
        ours[composite.path] = Composite(composite.path, parts)
    rows = {POSITIONS: config.seq_len} if POSITIONS in ours and config.seq_len < model.positions else {}
    folder = ModelFolder(path, family, files, shapes, ours, rows)
    for composite in ours.values():
        _check_parts(folder, composite)
        wanted = expected_shape(composite.path, config, model.vocab_size)
        if folder.shape(composite.path) != wanted:
            said = ", ".join(f"{part.name} {list(folder.shapes[part.name])}" for part in composite.parts)
            raise CheckpointError(
                f"{path}: {said} make {composite.path} {list(folder.shape(composite.path))}, and {CONFIG} "
                f"asks for {list(wanted)}"
            )
    return folder


def expected_shape(path: str, config: Config, vocab_size: int) -> Shape:
    """Of one of our weights, by the options of its model."""
    D, H, V = config.width, config.heads, vocab_size
    K, F = config.width_of_head(D, H), config.width_of_ffn(D)
    G = config.kv_heads or H
    layer, name = path.split("/")[-2:]
    outputs = {
        "query_key_value": 3 * H * K, "query": H * K, "key_value": 2 * G * K, "query_norm": K, "key_norm": K,
    }  # fmt: skip
    if layer == "embedding":
        return (V, D) if name == "embeddings" else (D, V)
    if path == POSITIONS:
        return (config.seq_len, D)
    wide = layer.endswith(("_feed_forward_in", "_feed_forward_gate"))
    last = outputs.get(layer, F if wide else D)
    if name != "kernel":
        return (last,)
    inputs = {"output_projection": H * K}
    return (inputs.get(layer, F if layer.endswith("_feed_forward_out") else D), last)


def left_over(folder: ModelFolder) -> list[str]:
    """Tensors of the folder that no weight of ours is made of."""
    used = {part.name for composite in folder.ours.values() for part in composite.parts}
    return [name for name in folder.files if name not in used and not name.endswith(folder.family.ignored)]


def _found(name: str, files: Mapping[str, Path], family: Family, path: Path) -> str:
    for candidate in (name, name.removeprefix(family.prefix)):
        if candidate in files:
            return candidate
    raise CheckpointError(f"{path}: its files of weights have no {name}, which {CONFIG} asks for")


def _check_parts(folder: ModelFolder, composite: Composite) -> None:
    shapes = [folder.shapes[part.name] for part in composite.parts]
    ranks = {len(shape) for shape in shapes}
    inputs = {
        shape[1:] if part.transposed else shape[:-1]
        for part, shape in zip(composite.parts, shapes, strict=True)
    }
    if len(ranks) > 1 or len(inputs) > 1 or not 1 <= min(ranks) <= max(ranks) <= 2:
        said = ", ".join(
            f"{part.name} {list(shape)}" for part, shape in zip(composite.parts, shapes, strict=True)
        )
        raise CheckpointError(f"{folder.path}: {said} cannot be one matrix")


def _headers(path: Path) -> tuple[dict[str, Path], dict[str, Shape]]:
    """The file and the shape of every tensor of a folder."""
    files: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    index = _index(path)
    for name in sorted(set(index.values())) or [WEIGHTS]:
        file = path / name
        for tensor, (kind, shape) in _header(file).items():
            if index and index.get(tensor) != name:
                continue
            if kind not in TYPES:
                raise CheckpointError(
                    f"{file}: {shown(tensor)} is of type {kind}; known are {', '.join(TYPES)}"
                )
            files[tensor], shapes[tensor] = file, shape
    missing = [tensor for tensor in index if tensor not in files]
    if missing:
        raise CheckpointError(
            f"{path / index[missing[0]]} has no {shown(missing[0])}, which {INDEX} says it has"
        )
    return files, shapes


def _index(path: Path) -> dict[str, str]:
    """The shard of each tensor; empty where there is one file."""
    if not (path / INDEX).exists():
        return {}
    found = _json(path / INDEX, INDEX_BYTES).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path / INDEX} has no weight_map")
    for name in found.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path / INDEX}: {shown(name)} is no file of weights in this folder")
    return found


def _header(file: Path) -> dict[str, tuple[str, Shape]]:
    """Type and shape of each tensor; `safetensors` checks offsets and lengths."""
    package = safetensors_package(".")
    try:
        opened(file, follow=True).close()  # the library would wait for a named pipe
        with package.safe_open(file, framework="np") as one:
            slices = {name: one.get_slice(name) for name in one.keys()}
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, package.SafetensorError) as error:
        raise CheckpointError(f"{file} is not a file of safetensors, or damaged: {error}") from error
    empty = [name for name, (_, shape) in found.items() if not math.prod(shape)]
    if empty:
        raise CheckpointError(f"{file}: {shown(empty[0])} is empty")
    return found
