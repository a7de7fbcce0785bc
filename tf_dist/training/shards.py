"""How a checkpoint comes to be on disk: shards by the ranks that write, then the rest by one of them.

    .tmp-step-00000400-…/shard-0001.bin     what rank 1 writes: whole tensors, one after another
    .tmp-step-00000400-…/shard-0001.json    its record: what is where, with a CRC-32 of each; synced after it
    manifest.json, the folder's new name, `latest`: by the first rank, when all records are there

Each step is synced before the next one, so whoever dies when, a folder with a checkpoint's name is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist.atomic_io import sync_folder, temporary_name, write_synced, write_whole
from tf_dist.errors import CheckpointError
from tf_dist.training.manifest import DTYPES, NAME, crc32_of, encoded, read_json, shard_file

# A tensor's place in the manifest, its name, and itself.
Numbered = tuple[int, str, np.ndarray]


def dealt(sizes: Sequence[int], writers: Sequence[int]) -> list[int]:
    """Which writer writes which tensor: the largest first, each to whom has least.

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
    """How many bytes were `dealt` to a writer."""
    return sum(size for size, one in zip(sizes, of, strict=True) if one == writer)


def begin(final: Path) -> Path:
    """Make the temporary folder of a checkpoint. Raises `OSError`."""
    temporary = temporary_name(final)
    temporary.mkdir(parents=True)
    return temporary


def write_shard(temporary: Path, number: int, tensors: Iterable[Numbered]) -> None:
    """Write one shard and its record.

    Args:
        temporary: where.
        number: of the shard: the rank that writes it.
        tensors: place in the manifest, name and array; written one after another, so that they may be made
            as they are asked for.

    Raises:
        OSError: it could not be written.
        CheckpointError: a tensor is of a type that a checkpoint cannot hold.
    """
    entries, offset = list[Any](), 0
    with open(temporary / shard_file(number), "xb") as file:
        for place, name, tensor in tensors:
            array = np.ascontiguousarray(tensor)
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            if array.dtype.name not in DTYPES:
                raise CheckpointError(f"tensor {name!r} is of {array.dtype}, which a checkpoint cannot hold")
            raw = array.reshape(-1).view(np.uint8).data
            file.write(raw)
            entry: dict[str, Any] = {"name": name, "shape": list(tensor.shape), "dtype": array.dtype.name}
            entry |= {"file": shard_file(number), "offset": offset, "bytes": len(raw)}
            entries.append([place, {**entry, "crc32": zlib.crc32(raw)}])
            offset += len(raw)
        file.flush()
        os.fsync(file.fileno())
    record = {"entries": entries}
    half = temporary / f".shard-{number:04d}.json"
    write_synced(half, json.dumps({**record, "crc32": crc32_of(record)}).encode())
    os.rename(half, _record(temporary, number))
    sync_folder(temporary)


def recorded(temporary: Path, number: int) -> bool:
    """Whether a shard is written and synced."""
    return _record(temporary, number).exists()


def commit(temporary: Path, final: Path, facts: Mapping[str, Any], writers: Sequence[int]) -> None:
    """Make a checkpoint of shards of which all records are there.

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
    """Let a small file beside a checkpoint name it. Raises `CheckpointError`."""
    write_whole(checkpoint.parent / name, f"{checkpoint.name}\n".encode(), CheckpointError)


@contextlib.contextmanager
def told_apart(final: Path) -> Iterator[None]:
    """Says of a disk that is full, or of no use, what it means for a run.

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
    """Rename a folder over another: a folder that is not empty must be moved aside first."""
    if final.exists():
        aside = temporary_name(final)
        os.rename(final, aside)
        os.rename(temporary, final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(temporary, final)
