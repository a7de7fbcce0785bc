"""Unpack packages of Debian and PyPI: regular files alone, inside one folder, within limits."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from tf_dist.atomic_io import BLOCK_BYTES
from tf_dist.errors import DataError
from tf_dist.untrusted_files import opened

LOG = logging.getLogger(__name__)
# Far above what our packages hold; a small archive can stand for far more.
BYTES_LIMIT = 1 << 30
FILES_LIMIT = 50_000
DEB, ZIPS, TARS = ".deb", (".whl", ".zip"), (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
Member = tuple[str, "IO[bytes] | None"]


def unpack(archive: Path, folder: Path, wanted: Sequence[str] = (), nested: str = "") -> int:
    """Write the regular files of a package to a folder.

    Links, devices and empty folders are not made, so that nothing leads out of the folder.

    Args:
        archive: .deb (by dpkg-deb), .whl, .zip or .tar.*.
        folder: exists already; no file is replaced.
        wanted: globs over names in the archive, in which ``*`` stands for slashes, too; empty: all.
        nested: a glob; tar files of such a name are unpacked where they lie, as far as ``wanted``.

    Returns:
        Number of files written.

    Raises:
        DataError: damaged, of another kind, a name that leads out of the folder, a file twice, too large; or
            dpkg-deb is missing.
    """
    left_bytes, files = BYTES_LIMIT, 0
    try:
        with _members(archive) as members:
            for name, stream in members:
                if stream is None or (wanted and not any(fnmatch.fnmatch(name, one) for one in wanted)):
                    continue
                path = _inside(folder, name, archive)
                files += 1
                left_bytes -= _write(stream, path, left_bytes)
                if left_bytes < 0 or files > FILES_LIMIT:
                    raise DataError(
                        f"{archive} holds more than {BYTES_LIMIT:,} bytes or {FILES_LIMIT:,} files: it is "
                        "not what we expected. Delete it."
                    )
                if nested and fnmatch.fnmatch(name, nested):
                    files += unpack(path, path.parent, wanted)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(f"cannot unpack {archive}: {error}. Delete it, and try again.") from error
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"cannot unpack {archive}: {why}. Delete it, and check the disk.") from error
    return files


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """Names and streams of the files of an archive; no stream for what is no regular file."""
    if archive.name.endswith(DEB):
        with _deb_contents(archive) as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
            yield _tar_members(tar)
    elif archive.name.endswith(TARS):
        with opened(archive, follow=True) as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
            yield _tar_members(tar)
    elif archive.name.endswith(ZIPS):
        with opened(archive, follow=True) as raw, zipfile.ZipFile(raw) as zipped:
            yield _zip_members(zipped)
    else:
        raise DataError(f"{archive} is of an unknown kind: we unpack {' '.join((DEB, *ZIPS, *TARS))}.")


def _tar_members(tar: tarfile.TarFile) -> Iterator[Member]:
    for member in tar:
        yield member.name, tar.extractfile(member) if member.isreg() else None


def _zip_members(zipped: zipfile.ZipFile) -> Iterator[Member]:
    for member in zipped.infolist():
        # A link is a file of its own kind in the upper half of the attributes.
        is_link = (member.external_attr >> 28) == 0o12
        if member.is_dir() or is_link:
            yield member.filename, None
        else:
            with zipped.open(member) as stream:
                yield member.filename, stream


@contextlib.contextmanager
def _deb_contents(archive: Path) -> Iterator[IO[bytes]]:
    """The tar stream in a .deb."""
    if shutil.which("dpkg-deb") is None:
        raise DataError(f"unpacking {archive} needs dpkg-deb, of Debian's or Ubuntu's package dpkg.")
    command = ["dpkg-deb", "--fsys-tarfile", os.path.abspath(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            yield process.stdout
            while process.stdout.read(BLOCK_BYTES):  # the padding behind the last file
                pass
            said = process.stderr.read(1000).decode("utf-8", "replace")
        finally:
            process.kill()
    if process.returncode > 0:
        raise DataError(f"cannot unpack {archive}: {' '.join(said.split())}. Delete it, and try again.")


def _inside(folder: Path, name: str, archive: Path) -> Path:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\0" in name or not parts:
        raise DataError(
            f"{archive} holds {name!r}, which leads out of its folder: it is not what we expected."
        )
    return folder.joinpath(*parts)


def _write(stream: IO[bytes], path: Path, limit_bytes: int) -> int:
    """Copy a stream to a new file, up to just above the limit; returns the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with open(path, "xb") as file:
        while size <= limit_bytes and (block := stream.read(BLOCK_BYTES)):
            file.write(block)
            size += len(block)
    return size
