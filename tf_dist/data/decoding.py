"""Bytes -> text that is certainly UTF-8, with the place of the first byte that is not.

One policy for every kind of file: a byte order mark at the start is dropped; carriage returns stay as
they are, so a corpus is the same bytes on every machine; NUL is a character like any other; bytes
that are not UTF-8 stop the reading (``strict``) or become U+FFFD and are counted (``replace``).
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from tf_dist.errors import DataError
from tf_dist.untrusted_files import opened as opened_regular

READ_BYTES = 1 << 18
BYTE_ORDER_MARK = "\ufeff"
REPLACEMENT = "\ufffd"


@dataclass
class Counts:
    """What one pass over a corpus met.

    documents: how many were handed out. text_bytes: their length in UTF-8. replaced: runs of bad bytes
    that became U+FFFD. nulls: cells without a value. empty: documents without a character. not_utf8 and
    duplicates: files of the standard library left out.
    """

    documents: int = 0
    text_bytes: int = 0
    replaced: int = 0
    nulls: int = 0
    empty: int = 0
    not_utf8: int = 0
    duplicates: int = 0


@contextlib.contextmanager
def opened(path: Path, size_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a plain or ``.gz`` file for reading its (decompressed) bytes.

    Args:
        path: the file.
        size_bytes: read no more than this, so that a file which grows while it is read stays the
            file that was listed. Not for ``.gz``.

    Raises:
        DataError: the file cannot be opened or read, or its compression is damaged.
    """
    try:
        with opened_regular(path, follow=True) as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=raw) as unzipped:
                    yield cast(BinaryIO, unzipped)
            else:
                yield raw if size_bytes is None else cast(BinaryIO, _Head(raw, size_bytes))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}. Compress it again, or get a whole copy.") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot read {path}: {reason}. Check the path and its permissions.") from error


class _Head:
    """The first ``size_bytes`` of a stream."""

    def __init__(self, raw: BinaryIO, size_bytes: int) -> None:
        self._raw, self._left = raw, size_bytes

    def read(self, size: int) -> bytes:
        data = self._raw.read(min(size, self._left))
        self._left -= len(data)
        return data


def decoded(stream: BinaryIO, name: str, errors: str, counts: Counts) -> Iterator[str]:
    """The text of a byte stream, in strings of up to about `READ_BYTES`.

    Args:
        stream: where the bytes come from.
        name: what to call it in an error.
        errors: ``strict`` or ``replace``.
        counts: its ``replaced`` grows.

    Raises:
        DataError: bytes that are not UTF-8, when ``errors`` is ``strict``; says at which offset.
    """
    tail, offset, final = b"", 0, False
    while not final:
        read = stream.read(READ_BYTES)
        final = not read
        data = tail + read
        text, used = _decode(data, errors, final, name, offset)
        if errors == "replace":
            # UTF-8 synchronises itself, so a replacement character that stood in the file is always
            # decoded as one: every other one in the text is a replacement.
            counts.replaced += text.count(REPLACEMENT) - data[:used].count(REPLACEMENT.encode())
        if offset == 0 and used and text.startswith(BYTE_ORDER_MARK):
            text = text[1:]
        tail, offset = data[used:], offset + used
        if text:
            yield text


def _decode(data: bytes, errors: str, final: bool, name: str, offset: int) -> tuple[str, int]:
    try:
        return codecs.utf_8_decode(data, errors, final)
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {at} ({error.reason}). "
            "Convert the file (iconv -t utf-8), or use --errors replace."
        ) from error


class Utf8Bytes(io.RawIOBase):
    """A decoded text as bytes again: what a table reader is given, so that it meets only valid UTF-8.

    A reader may swallow what is raised inside ``read``; ``failure`` keeps it.
    """

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts, self._pending = texts, b""
        self.failure: DataError | None = None

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill ``buffer``; the number of bytes written, 0 at the end."""
        try:
            while not self._pending:
                self._pending = next(self._texts).encode()
        except StopIteration:
            return 0
        except DataError as error:
            self.failure = error
            raise
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count
