"""Files that are written whole or not at all, and read with a limit."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tf_dist.errors import DataError, TfDistError

BLOCK_BYTES = 1 << 20


def read_capped(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a file that we expect to be small.

    Raises:
        DataError: not there, not readable, or larger than ``limit_bytes``.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check the path.") from error
    if len(data) > limit_bytes:
        raise DataError(f"{path} is larger than {limit_bytes:,} bytes, so it is not what we expected.")
    return data


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that nobody else uses; what lies there after a crash may be deleted."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def write_whole(path: Path, data: bytes, failure: type[TfDistError] = DataError) -> None:
    """Write ``data`` to ``path`` by way of a temporary name: a reader sees the old file or the new one.

    Raises:
        DataError: the file cannot be written; or the ``failure`` that is given.
    """
    with replaced(path, failure) as temporary:
        write_synced(temporary, data)


@contextmanager
def replaced(path: Path, failure: type[TfDistError] = DataError, ending: str = "") -> Iterator[Path]:
    """The name of a file that takes the place of ``path``, once it has been written and synced in the block.

    Args:
        path: of the file; the old one stays if anything goes wrong.
        failure: raised where it cannot be written.
        ending: of the temporary name, for writers that go by it.

    Raises:
        DataError: the file cannot be written; or the ``failure`` that is given.
    """
    temporary = temporary_name(path)
    temporary = temporary.with_name(temporary.name + ending)
    try:
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        why = error.strerror or error  # C libraries have words of their own
        raise failure(f"cannot write {path}: {why}. Check the disk and permissions.") from error


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, so that it survives a power cut. Raises `OSError`."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises `OSError`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
