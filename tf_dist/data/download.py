"""One file from the network, verified and written whole; one member of a zip, likewise."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tf_dist import progress
from tf_dist.atomic_io import BLOCK_BYTES, read_capped, sha256_of, sync_folder, temporary_name, write_whole
from tf_dist.errors import DataError
from tf_dist.untrusted_files import opened

LOG = logging.getLogger(__name__)
# Where no size is known, this much is more than any text we name.
LIMIT_BYTES = 4 << 30
NOTE_LIMIT_BYTES = 1 << 12
# A server that sends less than this, after a while, is given up.
PATIENCE_S, SLOWEST_BYTES_PER_S = 20.0, 1000
# Some hosts refuse Python's own name.
AGENT = "tf_dist (a language model trainer)"


@dataclass(frozen=True)
class ExpectedFile:
    """What is known of a file: its size and SHA-256, or None."""

    size_bytes: int | None
    sha256: str | None


def obtain(urls: Sequence[str], path: Path, wanted: ExpectedFile, instead: Path, timeout_s: float) -> None:
    """Make ``path`` the file of the first address that gives the right one, unless it is already.

    Args:
        urls: addresses of the same file.
        path: where it goes.
        wanted: what is known of it. Without a SHA-256, the one of the first download is kept beside the
            file and holds from then on.
        instead: which file a user may provide when no address answers.
        timeout_s: of each read.

    Raises:
        DataError: no address gave it; names each with the reason.
    """
    if is_intact(path, wanted):
        return
    failures = []
    for url in urls:
        size = f" ({wanted.size_bytes:,} bytes)" if wanted.size_bytes else ""
        LOG.info(f"downloading {url}{size} to {path}")
        try:
            _download(url, path, wanted, timeout_s)
            return
        except (OSError, ValueError, http.client.HTTPException, DataError) as error:
            why = " ".join(str(error).split())
            why = why if isinstance(error, DataError) else why[:300]  # of a server's words
            failures.append(f"{url}: {why or type(error).__name__}")
    tried = "; ".join(failures)
    raise DataError(
        f"could not download {tried}. "
        f"Get the text some other way and put it at {instead}, or use --data FILE."
    )


def is_intact(path: Path, wanted: ExpectedFile) -> bool:
    """Whether the file is there and right. A file put there by hand, of which nothing is known, is."""
    if not path.is_file():
        return False
    try:
        _verify(path, path.stat().st_size, sha256_of(path), wanted)
    except DataError as error:
        LOG.warning(f"{path}: {error}; getting it again")
        return False
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check its permissions.") from error
    return True


def _download(url: str, path: Path, wanted: ExpectedFile, timeout_s: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url, headers={"User-Agent": AGENT})  # noqa: S310 - http(s), checked
    with _opener().open(request, timeout=timeout_s) as response:
        promised = response.headers.get("Content-Length", "")
        _store(response, path, wanted, int(promised) if promised.isdigit() else None)


def _opener() -> urllib.request.OpenerDirector:
    """Follows redirections, to http and https alone: an ftp server or a file is none of what was named."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _store(stream: IO[bytes], path: Path, wanted: ExpectedFile, promised: int | None) -> None:
    """Copy a stream to a temporary name, verify it, and give it its name."""
    limit = LIMIT_BYTES if wanted.size_bytes is None else wanted.size_bytes
    temporary = temporary_name(path)
    digest, size, begun = hashlib.sha256(), 0, time.monotonic()
    # What has come so far, not whole blocks, for which a slow server could be waited for for ever.
    read = getattr(stream, "read1", stream.read)
    try:
        title = f"getting {path.name}"
        with open(temporary, "xb") as file, progress.task(title, promised or 0, "bytes") as task:
            while block := read(BLOCK_BYTES):
                passed_s = time.monotonic() - begun
                if passed_s > PATIENCE_S and size < SLOWEST_BYTES_PER_S * passed_s:
                    raise DataError(f"{size:,} bytes have come in {passed_s:.0f} s, which is too slow")
                size += len(block)
                if size > limit:
                    raise DataError(f"it is larger than {limit:,} bytes")
                digest.update(block)
                file.write(block)
                task.advance(len(block))
            file.flush()
            os.fsync(file.fileno())
        if promised is not None and size < promised:
            raise DataError(f"it ended after {size:,} of {promised:,} bytes")
        _verify(path, size, digest.hexdigest(), wanted)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _verify(path: Path, size: int, sha256: str, wanted: ExpectedFile) -> None:
    """Compare with what is known; what was not known is noted beside the file, and is known from now on."""
    if wanted.size_bytes is not None and size != wanted.size_bytes:
        raise DataError(f"it has {size:,} bytes, and should have {wanted.size_bytes:,}")
    note = path.with_name(path.name + ".sha256")
    known = wanted.sha256
    if known is None and note.is_file():
        known = read_capped(note, NOTE_LIMIT_BYTES).decode("ascii", "replace").strip()
    if known is None:
        write_whole(note, f"{sha256}\n".encode())
    elif sha256 != known:
        source = "" if wanted.sha256 else f" (noted in {note}: delete it if the text was renewed)"
        raise DataError(f"its SHA-256 is {sha256}, and should be {known}{source}")


def unzip(archive: Path, member: str, path: Path, wanted: ExpectedFile) -> None:
    """Unpack one member of a zip to ``path``, and nothing else; no name in the archive becomes a path.

    Raises:
        DataError: not a zip, no such member, or not the right text.
    """
    LOG.info(f"unpacking {member} from {archive}")
    try:
        with (
            opened(archive, follow=True) as raw,
            zipfile.ZipFile(raw) as zipped,
            zipped.open(member) as stream,
        ):
            _store(stream, path, wanted, None)
    except KeyError as error:
        raise DataError(f"{archive} has no member {member}. Delete it, and try again.") from error
    except DataError as error:
        raise DataError(
            f"{member} of {archive} is wrong: {error}. Delete the archive, and try again."
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise DataError(f"cannot unpack {archive}: {error}. Delete it, and try again.") from error
