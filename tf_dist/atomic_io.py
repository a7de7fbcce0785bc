"""Atomic file writes: a random temporary name, fsync, rename.

A temporary name is random and must not be there yet (O_EXCL), and takes the place of the file by a rename: so
nothing is written through a link that somebody has put in a folder. Reading is `tf_dist.untrusted_files`'s.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tf_dist.errors import DataError, TfDistError
from tf_dist.untrusted_files import opened, read_bytes

BLOCK_BYTES = 1 << 20


def read_capped(path: Path, limit_bytes: int, *, follow: bool = True) -> bytes:
    """The bytes of a regular file that we expect to be small.

    Args:
        path: of the file.
        limit_bytes: it may have.
        follow: whether it may be a link; not where it lies in a run folder.

    Raises:
        DataError: not there, not readable, no regular file, or larger than ``limit_bytes``.
    """
    try:
        return read_bytes(path, limit_bytes, follow=follow)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check the path.") from error


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that nobody else uses; what lies there after a crash may be deleted."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(8)}")


def write_whole(path: Path, data: bytes, failure: type[TfDistError] = DataError) -> None:
    """Write ``data`` to ``path`` by way of a temporary name: a reader sees the old file or the new one.

    Raises:
        DataError: the file cannot be written; or the ``failure`` that is given.
    """
    with replaced(path, failure) as temporary:
        write_synced(temporary, data)


def write_in_place_of(
    path: Path, write: Callable[[BinaryIO], object], failure: type[TfDistError] = DataError
) -> None:
    """`write_whole` for what is too large to be held: ``write`` is given a new file to write to."""
    with replaced(path, failure) as temporary, open(temporary, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


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
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path, *, follow: bool = True) -> str:
    """The SHA-256 of a regular file, in hexadecimal; ``follow`` as of `read_capped`. Raises `OSError`."""
    digest = hashlib.sha256()
    with opened(path, follow=follow) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
