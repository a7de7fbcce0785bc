"""The manifest of a checkpoint: what is where, with a CRC-32 of each tensor and of itself.

Version 1 has one file, ``tensors.bin``, with one tensor after another. Version 2 has one shard for each rank
that writes, and says for each tensor which one it is in, and where. Both are read as version 2.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist import untrusted_files
from tf_dist.errors import CheckpointError
from tf_dist.untrusted_files import shown

FORMAT = "tf_dist checkpoint"
VERSION, READABLE = 2, (1, 2)
NAME = "manifest.json"
LIMIT_BYTES = 16 << 20
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")  # noqa: E501  # fmt: skip
# NumPy's own limits; anything beyond is not an array we wrote.
MOST_DIMENSIONS, LONGEST = 32, 1 << 48
STEP_FOLDER = re.compile(r"step-(\d{8,})", re.ASCII)
ONLY_FILE = "tensors.bin"
# No other name is opened, so no manifest leads out of its folder.
SHARD_FILE = re.compile(r"shard-[0-9]{4,6}\.bin")


def shard_file(number: int) -> str:
    """The file of the shard that rank ``number`` writes."""
    return f"shard-{number:04d}.bin"


def encoded(step: int, facts: Mapping[str, Any], entries: list[dict[str, Any]]) -> bytes:
    """A manifest as it is written.

    Args:
        step: optimizer steps taken.
        facts: JSON values to be kept.
        entries: of each tensor name, shape, dtype, file, offset, bytes and crc32.
    """
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "facts": facts, "tensors": entries}
    return json.dumps({**manifest, "crc32": crc32_of(manifest)}, indent=1).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, every part of it checked.

    Raises:
        CheckpointError: it is missing, too large, damaged, or of another version.
    """
    file_path = path / NAME
    manifest = read_json(file_path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file_path} is not the manifest of a checkpoint")
    if not _is_count(manifest.get("version")) or manifest["version"] not in READABLE:
        raise CheckpointError(
            f"{path} has format version {shown(manifest.get('version'))}; this release reads "
            f"{' and '.join(map(str, READABLE))}"
        )
    if manifest.pop("crc32", None) != crc32_of(manifest):
        raise CheckpointError(f"{file_path} is damaged (CRC-32)")
    entries, facts = manifest.get("tensors"), manifest.get("facts")
    step: Any = manifest.get("step")
    if not isinstance(entries, list) or not isinstance(facts, dict) or not _is_count(step):
        raise CheckpointError(f"{file_path} lacks tensors, facts or step")
    if step > LONGEST or (STEP_FOLDER.fullmatch(path.name) and path.name != f"step-{step:08d}"):
        raise CheckpointError(f"{file_path} is of step {shown(step)}, which is not that of its folder")
    for entry in entries:
        _check_entry(entry, file_path)
    if len({entry["name"] for entry in entries}) != len(entries):
        raise CheckpointError(f"{file_path} names a tensor twice")
    if manifest["version"] == 1:
        _place_one_after_another(entries)
    _check_places(entries, file_path)
    return manifest


def read_json(path: Path) -> Any:
    """A JSON file of at most 16 MiB.

    Raises:
        CheckpointError: it is missing, too large, or not JSON.
    """
    try:
        return untrusted_files.read_json(path, LIMIT_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def file_sizes(entries: list[dict[str, Any]]) -> dict[str, int]:
    """The files of a checkpoint, and the bytes that each must have."""
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry["file"]] = sizes.get(entry["file"], 0) + entry["bytes"]
    return sizes


def crc32_of(value: Mapping[str, Any]) -> int:
    """Of the content, not of its layout: keys sorted, no spaces."""
    return zlib.crc32(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _place_one_after_another(entries: list[dict[str, Any]]) -> None:
    offset = 0
    for entry in entries:
        entry.update(file=ONLY_FILE, offset=offset)
        offset += entry["bytes"]


def _check_entry(entry: Any, path: Path) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise CheckpointError(f"{path}: a tensor without a name")
    shape: Any = entry.get("shape")
    dtype, size = entry.get("dtype"), entry.get("bytes")
    sound = isinstance(shape, list) and all(map(_is_count, shape)) and dtype in DTYPES and _is_count(size)
    if not sound or not _is_count(entry.get("crc32")):
        raise CheckpointError(
            f"{path}: tensor {shown(entry['name'])} has a shape, dtype or size that cannot be"
        )
    if len(shape) > MOST_DIMENSIONS or any(length > LONGEST for length in shape):
        raise CheckpointError(f"{path}: tensor {shown(entry['name'])} has a shape that cannot be")
    elements = math.prod(shape)
    if elements * np.dtype(dtype).itemsize != size:
        raise CheckpointError(
            f"{path}: tensor {shown(entry['name'])} of {shown(shape)} {dtype} cannot have {size} bytes"
        )


def _check_places(entries: list[dict[str, Any]], path: Path) -> None:
    """Tensors fill their files without gap and without overlap, and the files lie in the folder."""
    ends: dict[str, int] = {}
    for entry in entries:
        file, offset = entry.get("file"), entry.get("offset")
        if file != ONLY_FILE and not (isinstance(file, str) and SHARD_FILE.fullmatch(file)):
            raise CheckpointError(
                f"{path}: tensor {shown(entry['name'])} is in {shown(file)}, which is no shard"
            )
        if not _is_count(offset) or offset != ends.get(file, 0):
            raise CheckpointError(
                f"{path}: tensor {shown(entry['name'])} cannot begin at {shown(offset)} of {file}"
            )
        ends[file] = offset + entry["bytes"]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
