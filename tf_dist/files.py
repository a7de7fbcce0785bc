"""Files that are written whole or not at all, and read with a limit."""

from __future__ import annotations

import hashlib
import os
import secrets
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
    temporary = temporary_name(path)
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise failure(f"cannot write {path}: {error.strerror}. Check the disk and permissions.") from error


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
