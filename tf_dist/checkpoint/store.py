"""Checkpoint store: atomic checkpoints that contain numbers only.

    checkpoints/step-00000400/manifest.json            what, where, and a CRC-32 of each tensor
    checkpoints/step-00000400/shard-0000.safetensors   tensors; any reader of safetensors opens it
    checkpoints/latest                                 the name of the newest one, for people and scripts
    checkpoints/best                                   that of the one with the lowest validation loss

Written under a temporary name, synced, then renamed (`shards`): a killed job leaves the old checkpoints or
the new one. The reader trusts nothing: it checks names, sizes and checksums before it returns an array, and
`newest` falls back to the last valid checkpoint. No pickle, no HDF5, no code.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tf_dist.checkpoint import shards
from tf_dist.checkpoint.crc import crc32_of_part
from tf_dist.checkpoint.manifest import STEP_FOLDER as STEP_FOLDER
from tf_dist.checkpoint.manifest import FileLayout, layout, read_manifest
from tf_dist.errors import CheckpointError
from tf_dist.untrusted_files import opened, read_bytes, shown

LOG = logging.getLogger(__name__)
BEST = "best"


def save(
    folder: Path, step: int, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any], count: int = 1
) -> Path:
    """Write a checkpoint of ``tensors`` at ``folder/step-NNNNNNNN``, all of it in this process.

    Args:
        folder: of the checkpoints; created if missing.
        step: optimizer steps taken.
        tensors: by name.
        facts: JSON values to be kept with them.
        count: of shards, as if so many ranks had written it.

    Raises:
        CheckpointError: it could not be written; older checkpoints are unchanged.
    """
    final = path_of(folder, step)
    held = [(number, name, tensor) for number, (name, tensor) in enumerate(tensors.items())]
    specs = [shards.TensorSpec(number, name, one.shape, one.dtype.name) for number, name, one in held]
    of = shards.assign([tensor.nbytes for _, _, tensor in held], range(count))
    with shards.explain_disk_errors(final):
        temporary = shards.begin(final)
        try:
            for rank in range(count):
                mine = [spec for spec in specs if of[spec.place] == rank]
                shards.write_shard(temporary, rank, mine, [held[spec.place] for spec in mine])
            shards.commit(temporary, final, facts, range(count))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def path_of(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


class OpenCheckpoint(NamedTuple):
    """A checkpoint whose manifest is valid, and whose files have the right sizes and headers."""

    path: Path
    manifest: dict[str, Any]
    files: dict[str, FileLayout]


def open_checkpoint(path: Path) -> OpenCheckpoint:
    """Read the manifest of a checkpoint and check its files, without reading a tensor.

    Raises:
        CheckpointError: the manifest is invalid; a file is missing, or has another size or header.
    """
    manifest = read_manifest(path)
    checkpoint = OpenCheckpoint(path, manifest, layout(manifest["tensors"]))
    for name, file_layout in checkpoint.files.items():
        with _opened(path / name, file_layout.size) as file:
            _check_header(file, file_layout.header, path / name)
    return checkpoint


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    """Read and verify a checkpoint.

    Returns:
        The tensors by name, the facts, and the step.

    Raises:
        CheckpointError: it is invalid.
    """
    checkpoint = open_checkpoint(path)
    return dict(read_tensors(checkpoint)), checkpoint.manifest["facts"], checkpoint.manifest["step"]


def read_tensors(checkpoint: OpenCheckpoint, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Read and verify the tensors of a checkpoint one by one, by name.

    Args:
        checkpoint: from `open_checkpoint`.
        prefix: of the requested names.

    Raises:
        CheckpointError: a tensor is invalid.
    """
    for entry in checkpoint.manifest["tensors"]:
        if not entry["name"].startswith(prefix):
            continue
        file_path, (head, size) = checkpoint.path / entry["file"], checkpoint.files[entry["file"]]
        _check_fits_memory(entry, file_path)
        try:
            # Files are not kept open: a large job has written more of them than may be open.
            with _opened(file_path, size) as file:
                file.seek(len(head) + entry["offset"])
                raw = file.read(entry["bytes"])
            if len(raw) != entry["bytes"] or zlib.crc32(raw) != entry["crc32"]:
                raise _damaged(entry, file_path)
            dtype = np.dtype(entry["dtype"]).newbyteorder("<")
            yield entry["name"], np.frombuffer(raw, dtype).reshape(entry["shape"])
        except OSError as error:
            raise CheckpointError(f"cannot read {file_path}: {error.strerror}") from error
        except ValueError as error:  # an empty array whose other lengths overflow
            raise CheckpointError(f"{file_path}: {error}") from error


def _opened(path: Path, size: int) -> BinaryIO:
    """Open a file of a checkpoint: a regular file of this folder, of this size.

    Raises:
        CheckpointError: it is not.
    """
    try:
        file = opened(path, follow=False)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    found = os.fstat(file.fileno()).st_size
    if found != size:
        file.close()
        raise CheckpointError(f"{path} has {found} bytes, not {size}")
    return file


def _check_fits_memory(entry: Mapping[str, Any], path: Path) -> None:
    """Refuse a tensor larger than this machine's memory: a sparse file may claim any size."""
    if entry["bytes"] > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        size = f"{entry['bytes'] / 1e9:,.0f} GB"
        raise CheckpointError(
            f"{path}: tensor {shown(entry['name'])} has {size}, more than the memory of this machine"
        )


def _damaged(entry: Mapping[str, Any], path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: tensor {shown(entry['name'])} is damaged (CRC-32)")


def verify(path: Path) -> dict[str, Any]:
    """Verify a checkpoint in constant memory; returns its manifest.

    Raises:
        CheckpointError: it is invalid.
    """
    manifest = read_manifest(path)
    for name, (head, size) in layout(manifest["tensors"]).items():
        with _opened(path / name, size) as file:
            _check_header(file, head, path / name)
            for entry in (one for one in manifest["tensors"] if one["file"] == name):
                _check_fits_memory(entry, path / name)
                _check_sum(file, len(head), entry, path / name)
    return manifest


def _check_header(file: BinaryIO, head: bytes, path: Path) -> None:
    """Whether a shard says of its tensors what the manifest says."""
    try:
        found = file.read(len(head))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if found != head:
        raise CheckpointError(f"{path} is damaged: its header is not that of the manifest")


def _check_sum(file: BinaryIO, begin: int, entry: Mapping[str, Any], path: Path) -> None:
    """Read a tensor, a little at a time."""
    try:
        crc, there = crc32_of_part(file.fileno(), begin + entry["offset"], entry["bytes"])
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if there != entry["bytes"] or crc != entry["crc32"]:
        raise _damaged(entry, path)


def newest(folder: Path, after: int = -1) -> Path | None:
    """The newest valid checkpoint in ``folder``; None if there has never been one.

    Args:
        folder: of the checkpoints.
        after: only checkpoints of later steps are considered, and None is returned if none of them is valid.

    Raises:
        CheckpointError: there are checkpoints, but no valid one.
    """
    found = listing(folder, after)
    for path in reversed(found):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            LOG.warning(f"skipping {path.name}: {error}")
    if found and after < 0:
        raise none_sound(found)
    return None


def none_sound(found: Sequence[Path]) -> CheckpointError:
    """The error that no checkpoint of a folder is valid."""
    return CheckpointError(
        f"none of the {len(found)} checkpoints in {found[0].parent} can be used. "
        "Start anew with --resume never"
    )


def listing(folder: Path, after: int = -1) -> list[Path]:
    """The checkpoints in ``folder`` of steps after this one, oldest first, valid or not."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name))
    return sorted((path for path in found if step_of(path) > after), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def prune(folder: Path, keep: int, step: int) -> None:
    """Keep the newest ``keep`` checkpoints up to ``step``, just saved, and the best; remove older ones.

    Checkpoints beyond ``step`` were skipped as damaged when the run was resumed: they do not count and
    are not removed. Incomplete ones of killed jobs are removed.
    """
    kept = best(folder)
    for path in [path for path in listing(folder) if step_of(path) <= step][:-keep]:
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)
    remove_unfinished(folder)


def best(folder: Path) -> Path | None:
    """The checkpoint named by the file ``best``, valid or not; None if there is none."""
    try:
        name = read_bytes(folder / BEST, 64, follow=False).decode("ascii", "replace").strip()
    except OSError:
        return None
    path = folder / name
    return path if STEP_FOLDER.fullmatch(name) and path.is_dir() else None


def mark_if_best(path: Path, val_loss: float | None) -> None:
    """Point ``best`` to a checkpoint if its validation loss is lower than that of the current best.

    Args:
        path: of the checkpoint.
        val_loss: of its step; None without a validation.

    Raises:
        CheckpointError: the name cannot be written.
    """
    if val_loss is None or not math.isfinite(val_loss):
        return
    before = best(path.parent)
    if before is not None and before != path:
        try:
            known = read_manifest(before)["facts"].get("val_loss")
        except CheckpointError:
            known = None
        if isinstance(known, int | float) and math.isfinite(known) and known <= val_loss:
            return
    shards.point_to(path, BEST)


def remove_unfinished(folder: Path) -> None:
    """Remove incomplete checkpoints of killed jobs."""
    for path in folder.glob(".tmp-step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*folder.glob(".tmp-latest-*"), *folder.glob(".tmp-best-*"), *folder.glob(".probe-*")):
        path.unlink(missing_ok=True)
