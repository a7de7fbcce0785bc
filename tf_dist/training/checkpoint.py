"""Checkpoints that are there whole or not at all, and carry numbers only.

    checkpoints/step-00000400/manifest.json    what, where, and a CRC-32 of each tensor
    checkpoints/step-00000400/tensors.bin      raw little-endian bytes, one tensor after another

Written under a temporary name, synced, then renamed: a killed job leaves the old checkpoints or the
new one. The reader trusts nothing: it checks names, sizes and sums before it hands out an array, and
`newest` goes back to the last checkpoint that is sound. No pickle, no HDF5, no code.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist.errors import CheckpointError
from tf_dist.files import sync_folder, temporary_name

FORMAT = "tf_dist checkpoint"
VERSION = 1
MANIFEST_LIMIT_BYTES = 16 << 20
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")  # noqa: E501  # fmt: skip
# NumPy's own limits; anything beyond is not an array we wrote.
MOST_DIMENSIONS, LONGEST = 32, 1 << 48
STEP_FOLDER = re.compile(r"step-(\d{8,})")


Tensors = Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]]


def save(folder: Path, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> Path:
    """Write a checkpoint of ``tensors`` at ``folder/step-NNNNNNNN``; one rank calls this.

    Args:
        folder: holds the checkpoints; made if it is not there.
        step: optimizer steps taken.
        tensors: by name; written one after another, so that they may be made as they are asked for.
        facts: JSON values to be kept with them.

    Raises:
        CheckpointError: it could not be written; older checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = temporary_name(final)
    try:
        temporary.mkdir(parents=True)
        try:
            entries = _write_tensors(temporary / "tensors.bin", tensors)
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "step": step,
                "facts": facts,
                "tensors": entries,
            }
            manifest["crc32"] = _manifest_crc32(manifest)
            _write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
            sync_folder(temporary)
            _replace_folder(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {final}: {error.strerror}. Older checkpoints are untouched. "
            "Make room or choose another --run-dir, and start again: training goes on from the newest one"
        ) from error
    return final


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    """Read and verify a checkpoint.

    Returns:
        The tensors by name, the facts, and the step.

    Raises:
        CheckpointError: anything about it is not as it was written.
    """
    manifest = read_manifest(path)
    return dict(read_tensors(path, manifest)), manifest["facts"], manifest["step"]


def read_tensors(path: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Read and verify the tensors of a checkpoint one after another, by name.

    Raises:
        CheckpointError: anything about them is not as it was written.
    """
    file_path = path / "tensors.bin"
    wanted = sum(entry["bytes"] for entry in manifest["tensors"])
    try:
        if file_path.stat().st_size != wanted:
            raise CheckpointError(f"{file_path} has {file_path.stat().st_size} bytes, not {wanted}")
        with open(file_path, "rb") as file:
            for entry in manifest["tensors"]:
                raw = file.read(entry["bytes"])
                if zlib.crc32(raw) != entry["crc32"]:
                    raise CheckpointError(f"{file_path}: tensor {entry['name']!r} is damaged (CRC-32)")
                dtype = np.dtype(entry["dtype"]).newbyteorder("<")
                yield entry["name"], np.frombuffer(raw, dtype).reshape(entry["shape"])
    except OSError as error:
        raise CheckpointError(f"cannot read {file_path}: {error.strerror}") from error
    except ValueError as error:  # an empty array whose other lengths overflow
        raise CheckpointError(f"{file_path}: {error}") from error


def verify(path: Path) -> dict[str, Any]:
    """Read all of a checkpoint, keeping one tensor at a time; its manifest.

    Raises:
        CheckpointError: anything about it is not as it was written.
    """
    manifest = read_manifest(path)
    for _ in read_tensors(path, manifest):
        pass
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, every part of it checked.

    Raises:
        CheckpointError: it is missing, too large, damaged, or of another version.
    """
    file_path = path / "manifest.json"
    try:
        with open(file_path, "rb") as file:
            raw = file.read(MANIFEST_LIMIT_BYTES + 1)
        manifest = json.loads(raw) if len(raw) <= MANIFEST_LIMIT_BYTES else None
    except OSError as error:
        raise CheckpointError(f"cannot read {file_path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file_path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file_path} is not the manifest of a checkpoint")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest.get('version')}; this release reads {VERSION}"
        )
    if manifest.pop("crc32", None) != _manifest_crc32(manifest):
        raise CheckpointError(f"{file_path} is damaged (CRC-32)")
    entries, facts, step = (manifest.get(key) for key in ("tensors", "facts", "step"))
    if not isinstance(entries, list) or not isinstance(facts, dict) or not _is_count(step):
        raise CheckpointError(f"{file_path} lacks tensors, facts or step")
    for entry in entries:
        _check_entry(entry, file_path)
    if len({entry["name"] for entry in entries}) != len(entries):
        raise CheckpointError(f"{file_path} names a tensor twice")
    return manifest


def newest(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest sound checkpoint in ``folder``; None if there has never been one.

    Raises:
        CheckpointError: there are checkpoints, but not one that can be used.
    """
    found = listing(folder)
    for path in reversed(found):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            say(f"skipping {path.name}: {error}")
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} can be used. Start anew with --resume never"
        )
    return None


def listing(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first, sound or not."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def prune(folder: Path, keep: int, step: int) -> None:
    """Keep the newest ``keep`` checkpoints up to ``step``, the one just saved; remove older ones.

    What lies beyond ``step`` was passed over as damaged when the run was resumed: it neither counts nor
    goes. What killed jobs left half written does go.
    """
    for path in [path for path in listing(folder) if _step_of(path) <= step][:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".tmp-step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _write_tensors(path: Path, tensors: Tensors) -> list[dict[str, Any]]:
    entries = []
    with open(path, "xb") as file:
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            array = np.ascontiguousarray(tensor)
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            if array.dtype.name not in DTYPES:
                raise CheckpointError(f"tensor {name!r} is of {array.dtype}, which a checkpoint cannot hold")
            raw = array.tobytes()
            file.write(raw)
            entries.append(
                {
                    "name": name,
                    "shape": list(tensor.shape),
                    "dtype": array.dtype.name,
                    "bytes": len(raw),
                    "crc32": zlib.crc32(raw),
                }
            )
        file.flush()
        os.fsync(file.fileno())
    return entries


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace_folder(temporary: Path, final: Path) -> None:
    """Rename a folder over another: a folder that is not empty must be moved aside first."""
    if final.exists():
        aside = temporary_name(final)
        os.rename(final, aside)
        os.rename(temporary, final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(temporary, final)


def _check_entry(entry: Any, path: Path) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise CheckpointError(f"{path}: a tensor without a name")
    shape: Any = entry.get("shape")
    dtype, size = entry.get("dtype"), entry.get("bytes")
    sound = isinstance(shape, list) and all(map(_is_count, shape)) and dtype in DTYPES and _is_count(size)
    if not sound or not _is_count(entry.get("crc32")):
        raise CheckpointError(f"{path}: tensor {entry['name']!r} has a shape, dtype or size that cannot be")
    if len(shape) > MOST_DIMENSIONS or any(length > LONGEST for length in shape):
        raise CheckpointError(f"{path}: tensor {entry['name']!r} has a shape that cannot be")
    elements = math.prod(shape)
    if elements * np.dtype(dtype).itemsize != size:
        raise CheckpointError(f"{path}: tensor {entry['name']!r} of {shape} {dtype} cannot have {size} bytes")


def _manifest_crc32(manifest: Mapping[str, Any]) -> int:
    """Of the content, not of its layout: keys sorted, no spaces."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
