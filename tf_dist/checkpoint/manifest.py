"""Checkpoint manifest: index of all tensors, with a CRC-32 of each tensor and of itself.

Version 1 has one file, ``tensors.bin``, with one tensor after another. Version 2 has one shard for each rank
that writes, and says for each tensor which one it is in, and where. In version 3 shards are files of
safetensors, each with a header that follows from the manifest, byte for byte. All are read alike.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - makes NumPy know bfloat16
import numpy as np

from tf_dist import untrusted_files
from tf_dist.errors import CheckpointError
from tf_dist.untrusted_files import shown

FORMAT = "tf_dist checkpoint"
VERSION, READABLE = 3, (1, 2, 3)
NAME = "manifest.json"
LIMIT_BYTES = 16 << 20
# What safetensors calls them.
DTYPES = {
    "float16": "F16", "float32": "F32", "float64": "F64", "int8": "I8", "int16": "I16", "int32": "I32",
    "int64": "I64", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "bfloat16": "BF16",
}  # fmt: skip
# NumPy's own limits; anything beyond is not an array we wrote.
MOST_DIMENSIONS, LONGEST = 32, 1 << 48
STEP_FOLDER = re.compile(r"step-(\d{8,})", re.ASCII)
# The files of each version. No other name is opened, so no manifest leads out of its folder.
ONLY_FILE, SAFETENSORS = "tensors.bin", ".safetensors"
FILES = {
    1: re.compile(r"tensors\.bin"),
    2: re.compile(r"shard-[0-9]{4,6}\.bin"),
    3: re.compile(r"shard-[0-9]{4,6}\.safetensors"),
}


def shard_file(number: int) -> str:
    """The file of the shard that rank ``number`` writes."""
    return f"shard-{number:04d}{SAFETENSORS}"


def encoded(step: int, facts: Mapping[str, Any], entries: list[dict[str, Any]]) -> bytes:
    """Encode a manifest.

    Args:
        step: optimizer steps taken.
        facts: JSON metadata.
        entries: of each tensor name, shape, dtype, file, offset, bytes and crc32.
    """
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "facts": facts, "tensors": entries}
    return json.dumps({**manifest, "crc32": crc32_of(manifest)}, indent=1).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, and validate all of it.

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
            f"{', '.join(map(str, READABLE))}"
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
    _check_places(entries, file_path, manifest["version"])
    return manifest


def read_json(path: Path) -> Any:
    """Read a JSON file of at most 16 MiB.

    Raises:
        CheckpointError: it is missing, too large, or not JSON.
    """
    try:
        return untrusted_files.read_json(path, LIMIT_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


class FileLayout(NamedTuple):
    """A file of a checkpoint: the bytes that it begins with (none before version 3), and its size."""

    header: bytes
    size: int


def layout(entries: Iterable[dict[str, Any]]) -> dict[str, FileLayout]:
    """The files of a checkpoint by name, as they follow from its tensors."""
    files: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        files.setdefault(entry["file"], []).append(entry)
    found = {}
    for name, held in files.items():
        head = header(held) if name.endswith(SAFETENSORS) else b""
        found[name] = FileLayout(head, len(head) + sum(entry["bytes"] for entry in held))
    return found


def header(entries: Iterable[dict[str, Any]]) -> bytes:
    """The header of a file of safetensors: its length in 8 bytes, and JSON padded to a multiple of 8.

    Args:
        entries: of the tensors in the file name, dtype, shape, offset (after the header) and bytes.
    """
    held = sorted(entries, key=lambda entry: (entry["offset"], entry["bytes"], entry["name"]))
    tensors = {
        entry["name"]: {
            "dtype": DTYPES[entry["dtype"]],
            "shape": entry["shape"],
            "data_offsets": [entry["offset"], entry["offset"] + entry["bytes"]],
        }
        for entry in held
    }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def crc32_of(value: Mapping[str, Any]) -> int:
    """CRC-32 of the canonical form: keys sorted, no spaces."""
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
    sound = isinstance(shape, list) and all(map(_is_count, shape)) and _is_dtype(dtype) and _is_count(size)
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


def _check_places(entries: list[dict[str, Any]], path: Path, version: int) -> None:
    """Tensors fill their files without gap and without overlap, and the files lie in the folder."""
    ends: dict[str, int] = {}
    for entry in entries:
        file = entry.get("file")
        if not (isinstance(file, str) and FILES[version].fullmatch(file)):
            raise CheckpointError(
                f"{path}: tensor {shown(entry['name'])} is in {shown(file)}, which is no shard"
            )
        if not _is_count(entry.get("offset")):
            raise _cannot_begin(entry, path)
    for entry in sorted(entries, key=lambda entry: (entry["offset"], entry["bytes"])):
        file, offset = entry["file"], entry["offset"]
        if offset != ends.get(file, 0):
            raise _cannot_begin(entry, path)
        ends[file] = offset + entry["bytes"]


def _cannot_begin(entry: Mapping[str, Any], path: Path) -> CheckpointError:
    at = f"{shown(entry.get('offset'))} of {entry['file']}"
    return CheckpointError(f"{path}: tensor {shown(entry['name'])} cannot begin at {at}")


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in DTYPES


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
