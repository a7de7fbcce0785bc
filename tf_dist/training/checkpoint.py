"""Checkpoints that are there whole or not at all, and carry numbers only.

    checkpoints/step-00000400/manifest.json    what, where, and a CRC-32 of each tensor
    checkpoints/step-00000400/shard-0000.bin   raw little-endian bytes, one tensor after another; and so on
    checkpoints/latest                         the name of the newest one, for people and scripts
    checkpoints/best                           that of the one with the lowest validation loss

Written under a temporary name, synced, then renamed (`shards`): a killed job leaves the old checkpoints or
the new one. The reader trusts nothing: it checks names, sizes and sums before it hands out an array, and
`newest` goes back to the last checkpoint that is sound. No pickle, no HDF5, no code.
"""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tf_dist import terminal
from tf_dist.errors import CheckpointError
from tf_dist.training import shards
from tf_dist.training.crc import crc32_of_part
from tf_dist.training.manifest import STEP_FOLDER as STEP_FOLDER
from tf_dist.training.manifest import file_sizes, read_manifest
from tf_dist.untrusted_files import opened, read_bytes, shown

BEST = "best"


Tensors = Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]]


def save(folder: Path, step: int, tensors: Tensors, facts: Mapping[str, Any], count: int = 1) -> Path:
    """Write a checkpoint of ``tensors`` at ``folder/step-NNNNNNNN``, all of it in this process.

    Args:
        folder: holds the checkpoints; made if it is not there.
        step: optimizer steps taken.
        tensors: by name; written one after another, so that they may be made as they are asked for.
        facts: JSON values to be kept with them.
        count: of shards, as if so many ranks had written it; with more than one all tensors must be there.

    Raises:
        CheckpointError: it could not be written; older checkpoints are untouched.
    """
    final = path_of(folder, step)
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    numbered = ((number, name, tensor) for number, (name, tensor) in enumerate(pairs))
    with shards.told_apart(final):
        temporary = shards.begin(final)
        try:
            if count == 1:
                shards.write_shard(temporary, 0, numbered)
            else:
                held = list(numbered)
                of = shards.dealt([tensor.nbytes for _, _, tensor in held], range(count))
                for rank in range(count):
                    shards.write_shard(temporary, rank, (one for one in held if of[one[0]] == rank))
            shards.commit(temporary, final, facts, range(count))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    """Read and verify a checkpoint.

    Returns:
        The tensors by name, the facts, and the step.

    Raises:
        CheckpointError: anything about it is not as it was written.
    """
    manifest = read_manifest(path)
    return dict(read_tensors(path, manifest)), manifest["facts"], manifest["step"]


def read_tensors(
    path: Path, manifest: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    """Read and verify the tensors of a checkpoint one after another, by name.

    Args:
        path: of the checkpoint.
        manifest: of it, as `read_manifest` gives it.
        prefix: of the names that are wanted.

    Raises:
        CheckpointError: anything about them is not as it was written.
    """
    sizes = file_sizes(manifest["tensors"])
    for name, size in sizes.items():
        _opened(path / name, size).close()
    for entry in manifest["tensors"]:
        if not entry["name"].startswith(prefix):
            continue
        file_path = path / entry["file"]
        _check_has_room(entry, file_path)
        try:
            # Not one file kept open for each: a large job has written more of them than may be open.
            with _opened(file_path, sizes[entry["file"]]) as file:
                file.seek(entry["offset"])
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
    """A file of a checkpoint, opened: a plain file of this folder, of so many bytes.

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


def _check_has_room(entry: Mapping[str, Any], path: Path) -> None:
    """Refuse a tensor that no machine like this one can have saved: a file with holes may be of any size."""
    if entry["bytes"] > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        size = f"{entry['bytes'] / 1e9:,.0f} GB"
        raise CheckpointError(
            f"{path}: tensor {shown(entry['name'])} has {size}, more than the memory of this machine"
        )


def _damaged(entry: Mapping[str, Any], path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: tensor {shown(entry['name'])} is damaged (CRC-32)")


def verify(path: Path) -> dict[str, Any]:
    """Read all of a checkpoint, keeping a little of it at a time; its manifest.

    Raises:
        CheckpointError: anything about it is not as it was written.
    """
    manifest = read_manifest(path)
    for name, size in file_sizes(manifest["tensors"]).items():
        with _opened(path / name, size) as file:
            for entry in (one for one in manifest["tensors"] if one["file"] == name):
                _check_has_room(entry, path / name)
                _check_sum(file, entry, path / name)
    return manifest


def _check_sum(file: BinaryIO, entry: Mapping[str, Any], path: Path) -> None:
    """Read a tensor, a little at a time."""
    try:
        crc, there = crc32_of_part(file.fileno(), entry["offset"], entry["bytes"])
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if there != entry["bytes"] or crc != entry["crc32"]:
        raise _damaged(entry, path)


def newest(folder: Path, say: Callable[[str], object] = terminal.write, after: int = -1) -> Path | None:
    """The newest sound checkpoint in ``folder``; None if there has never been one.

    Args:
        folder: that holds them.
        say: told which ones are skipped, and why.
        after: only those of later steps are wanted, and None is an answer where none is sound.

    Raises:
        CheckpointError: there are checkpoints, but not one that can be used.
    """
    found = [path for path in listing(folder) if _step_of(path) > after]
    for path in reversed(found):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            say(f"skipping {path.name}: {error}")
    if found and after < 0:
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
    """Keep the newest ``keep`` checkpoints up to ``step``, just saved, and the best; remove older ones.

    What lies beyond ``step`` was passed over as damaged when the run was resumed: it neither counts nor
    goes. What killed jobs left half written does go.
    """
    kept = best(folder)
    for path in [path for path in listing(folder) if _step_of(path) <= step][:-keep]:
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)
    remove_unfinished(folder)


def best(folder: Path) -> Path | None:
    """The checkpoint that the file ``best`` names, sound or not; None where there is none."""
    try:
        name = read_bytes(folder / BEST, 64, follow=False).decode("ascii", "replace").strip()
    except OSError:
        return None
    path = folder / name
    return path if STEP_FOLDER.fullmatch(name) and path.is_dir() else None


def mark_if_best(path: Path, val_loss: float | None) -> None:
    """Let ``best`` name a checkpoint whose validation loss is lower than that of the one it names.

    Args:
        path: of the checkpoint.
        val_loss: of its step; None where that was not validated.

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
    """Remove what jobs that were killed have left half written."""
    for path in folder.glob(".tmp-step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*folder.glob(".tmp-latest-*"), *folder.glob(".tmp-best-*"), *folder.glob(".probe-*")):
        path.unlink(missing_ok=True)
