"""Write a checkpoint to disk: shards by the writer ranks, then the commit by one of them.

    .tmp-step-00000400-…/shard-0001.safetensors   what rank 1 writes: whole tensors
    .tmp-step-00000400-…/shard-0001.json          its record: what is where, with a CRC-32 of each; synced
                                                  after it
    manifest.json, the folder's new name, `latest`: by the first rank, when all records are there

Each step is synced before the next one, so after a crash at any time a folder with a checkpoint's name is
complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tf_dist.atomic_io import sync_folder, temporary_name, write_synced, write_whole
from tf_dist.checkpoint.manifest import DTYPES, NAME, crc32_of, encoded, header, read_json, shard_file
from tf_dist.errors import CheckpointError

# A tensor's index in the manifest, its name, and itself.
Numbered = tuple[int, str, np.ndarray]


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is there. place: in the manifest."""

    place: int
    name: str
    shape: tuple[int, ...]
    dtype: str


def assign(sizes: Sequence[int], writers: Sequence[int]) -> list[int]:
    """Assign tensors to writers: the largest first, each to the writer with the fewest bytes.

    Args:
        sizes: bytes of each tensor.
        writers: ranks, in order.

    Returns:
        A rank for each tensor.
    """
    loads, of = dict.fromkeys(writers, 0), [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        of[number] = min(loads, key=lambda rank: loads[rank])
        loads[of[number]] += sizes[number]
    return of


def bytes_of(sizes: Sequence[int], of: Sequence[int], writer: int) -> int:
    """Number of bytes assigned to a writer."""
    return sum(size for size, one in zip(sizes, of, strict=True) if one == writer)


def begin(final: Path) -> Path:
    """Create the temporary folder of a checkpoint. Raises `OSError`."""
    temporary = temporary_name(final)
    temporary.mkdir(parents=True)
    return temporary


def write_shard(
    temporary: Path, number: int, specs: Iterable[TensorSpec], tensors: Iterable[Numbered]
) -> None:
    """Write one shard, a file of safetensors, and its record.

    Args:
        temporary: folder.
        number: of the shard: the rank that writes it.
        specs: of all that will be in it.
        tensors: place in the manifest, name and array; written one after another, so that they may be made
            as they are asked for.

    Raises:
        OSError: it could not be written.
        CheckpointError: a tensor is of a type that a checkpoint cannot hold, or not as it was promised.
    """
    entries = _laid_out(specs, shard_file(number))
    head = header(entries.values())
    with open(temporary / shard_file(number), "xb") as file:
        file.write(head)
        for place, name, tensor in tensors:
            array, entry = np.ascontiguousarray(tensor), entries[place]
            raw = array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data
            if (array.dtype.name, len(raw)) != (entry["dtype"], entry["bytes"]):
                raise CheckpointError(f"tensor {name!r} is of {array.dtype}, not as it was promised")
            file.seek(len(head) + entry["offset"])
            file.write(raw)
            entry["crc32"] = zlib.crc32(raw)
        file.flush()
        os.fsync(file.fileno())
    record = {"entries": list(entries.items())}
    half = temporary / f".shard-{number:04d}.json"
    write_synced(half, json.dumps({**record, "crc32": crc32_of(record)}).encode())
    os.rename(half, _record(temporary, number))
    sync_folder(temporary)


def _laid_out(specs: Iterable[TensorSpec], file: str) -> dict[int, dict[str, Any]]:
    """Entries of the manifest by place: the widest types first, so that each is aligned."""
    specs, entries, offset = list(specs), {}, 0
    for spec in specs:
        if spec.dtype not in DTYPES or spec.name == "__metadata__":
            raise CheckpointError(f"tensor {spec.name!r} is of {spec.dtype}, which a checkpoint cannot hold")
    for spec in sorted(specs, key=lambda spec: (-np.dtype(spec.dtype).itemsize, spec.place)):
        size = prod(spec.shape) * np.dtype(spec.dtype).itemsize
        entry = {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}
        entries[spec.place] = entry | {"file": file, "offset": offset, "bytes": size}
        offset += size
    return entries


def recorded(temporary: Path, number: int) -> bool:
    """Whether a shard is written and synced."""
    return _record(temporary, number).exists()


def commit(temporary: Path, final: Path, facts: Mapping[str, Any], writers: Sequence[int]) -> None:
    """Commit a checkpoint whose shards and records are complete.

    Raises:
        OSError: it could not be written.
        CheckpointError: a record is damaged.
    """
    numbered = [entry for number in writers for entry in _entries(_record(temporary, number))]
    entries = [entry for _, entry in sorted(numbered, key=lambda one: int(one[0]))]
    step = int(final.name.removeprefix("step-"))
    write_synced(temporary / NAME, encoded(step, facts, entries))
    for number in writers:
        _record(temporary, number).unlink()
    sync_folder(temporary)
    _replace_folder(temporary, final)
    sync_folder(final.parent)
    point_to(final, "latest")


def point_to(checkpoint: Path, name: str) -> None:
    """Write the name of a checkpoint to a small file beside it. Raises `CheckpointError`."""
    write_whole(checkpoint.parent / name, f"{checkpoint.name}\n".encode(), CheckpointError)


@contextlib.contextmanager
def explain_disk_errors(final: Path) -> Iterator[None]:
    """Convert errors of a full or failing disk to errors with an explanation.

    Raises:
        CheckpointError: instead of `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {final}: {error.strerror}. Older checkpoints are untouched. "
            "Make room or choose another --run-dir, and start again: training goes on from the newest one"
        ) from error


def _record(temporary: Path, number: int) -> Path:
    return temporary / f"shard-{number:04d}.json"


def _entries(path: Path) -> list[list[Any]]:
    record = read_json(path)
    if not isinstance(record, dict) or record.pop("crc32", None) != crc32_of(record):
        raise CheckpointError(f"{path} is damaged (CRC-32)")
    return list(record["entries"])


def _replace_folder(temporary: Path, final: Path) -> None:
    """Replace a folder by another: a folder that is not empty must be moved aside first."""
    if final.exists():
        aside = temporary_name(final)
        os.rename(final, aside)
        os.rename(temporary, final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(temporary, final)
