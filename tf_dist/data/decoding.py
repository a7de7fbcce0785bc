"""Decode bytes as strict UTF-8, and report the offset of the first invalid byte.

One policy for every kind of file: a byte order mark at the start is dropped; carriage returns are
kept, so a corpus is the same bytes on every machine; NUL is an ordinary character; invalid
UTF-8 is an error (``strict``) or becomes U+FFFD and is counted (``replace``). Other
encodings and formats are refused under either.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from tf_dist.data.signatures import (
    HEAD_BYTES,
    check_is_narrow,
    check_is_no_pointer,
    check_is_text,
    check_is_written,
)
from tf_dist.errors import DataError
from tf_dist.untrusted_files import opened as opened_regular

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
READ_BYTES = 1 << 18
# A line of a table is held in memory: a file without line feeds is not a table.
LINE_CHARACTERS = 1 << 27
# Too short a text to detect its encoding.
LEAST_CHARACTERS = 256
# In Latin-1 one letter of twelve may be above ASCII; in GBK or cp1251 more than a third of the text is.
REPLACED_SHARE = 0.2
BYTE_ORDER_MARK = "\ufeff"
REPLACEMENT = "\ufffd"


@dataclass
class Counts:
    """Statistics of one pass over a corpus.

    documents: number yielded. text_bytes: their length in UTF-8. replaced: runs of invalid bytes
    that became U+FFFD. nulls: cells without a value. empty: documents without a character. not_utf8 and
    duplicates: skipped files of the standard library.
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
    """Open a file of a corpus for reading its bytes, decompressed according to its name.

    Args:
        path: the file.
        size_bytes: read no more than this, so that a file that grows while it is read is read
            as it was listed. Not for compressed files.

    Raises:
        DataError: the file cannot be opened or read, its compression is damaged, or it is only a pointer to
            the actual file.
    """
    try:
        with opened_regular(path, follow=True) as raw, _decompressed(path, raw) as stream:
            check_is_no_pointer(stream.peek(HEAD_BYTES)[:HEAD_BYTES], str(path))
            yield (
                stream if stream is not raw or size_bytes is None else cast(BinaryIO, _Head(raw, size_bytes))
            )
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # from bz2 and zstd, about the data
            raise _damaged(path, error) from error
        raise DataError(
            f"cannot read {path}: {error.strerror}. Check the path and its permissions."
        ) from error


def _decompressed(path: Path, raw: BinaryIO) -> contextlib.AbstractContextManager[Any]:
    """A buffered stream (with `peek`) of the decompressed data."""
    compression = split_name(path.name)[1]
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".bz2":
        return bz2.BZ2File(raw)
    if compression == ".xz":
        return lzma.LZMAFile(raw)
    if compression == ".zst":
        return _zstd(path, raw)
    return contextlib.nullcontext(raw)


def _zstd(path: Path, raw: BinaryIO) -> io.BufferedReader:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(
            f"reading {path} needs pyarrow: pip install 'tf_dist[parquet]', or decompress it: zstd -d"
        ) from error
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged: {error}. Compress it again, or get a whole copy.")


def split_name(name: str) -> tuple[str, str]:
    """The suffix of a file's format, and that of its compression: lower case, may be empty.

    ``Notes.TXT.GZ`` gives ``.txt`` and ``.gz``.
    """
    name = name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    return PurePath(name.removesuffix(compression)).suffix, compression


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
        stream: of bytes.
        name: for error messages.
        errors: ``strict`` or ``replace``.
        counts: its ``replaced`` is updated.

    Raises:
        DataError: invalid UTF-8, when ``errors`` is ``strict``, with its offset. Another
            encoding or format, for any ``errors``.
    """
    tail, offset, final = b"", 0, False
    characters, before = 0, counts.replaced
    while not final:
        read = stream.read(READ_BYTES)
        final = not read
        data = tail + read
        if not offset:
            check_is_text(data[:HEAD_BYTES], name)
        check_is_narrow(read, name)
        check_is_written(read, offset, name)
        text, used = _decode(data, errors, final, name, offset)
        if errors == "replace":
            # UTF-8 is self-synchronizing, so a replacement character in the file is always
            # decoded as one: every other one in the text is a replacement.
            counts.replaced += text.count(REPLACEMENT) - data[:used].count(REPLACEMENT.encode())
        if offset == 0 and used and text.startswith(BYTE_ORDER_MARK):
            text = text[1:]
        tail, offset, characters = data[used:], offset + used, characters + len(text)
        if text:
            yield text
    _check_replaced(counts.replaced - before, characters, name)


def _check_replaced(replaced: int, characters: int, name: str) -> None:
    """Isolated invalid bytes may be replaced; a text in another encoding is refused."""
    if characters >= LEAST_CHARACTERS and replaced > REPLACED_SHARE * characters:
        raise DataError(
            f"{name} is in another encoding, or no text: {replaced:,} of its {characters:,} characters are "
            "not UTF-8. Convert the file (iconv -f ENCODING -t UTF-8)"
        )


def _decode(data: bytes, errors: str, final: bool, name: str, offset: int) -> tuple[str, int]:
    try:
        return codecs.utf_8_decode(data, errors, final)
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {at} ({error.reason}). "
            "Convert the file (iconv -f latin1 -t utf-8, or what it is in), or use --errors replace."
        ) from error


def lines(texts: Iterator[str], name: str) -> Iterator[str]:
    """Split a text into lines, each with its line feed; no other character ends a line.

    Args:
        texts: the text, in strings of any length.
        name: for error messages.

    Raises:
        DataError: a line that is too long for a row of a table.
    """
    held: list[str] = []
    size, number = 0, 1
    for text in texts:
        for line in io.StringIO(text, newline="\n"):
            held.append(line)
            size += len(line)
            if size > LINE_CHARACTERS:
                raise DataError(
                    f"line {number} of {name} has more than {LINE_CHARACTERS:,} characters: that is no row "
                    "of a table. Is it one? A text has a name that ends in .txt"
                )
            if line.endswith("\n"):
                yield "".join(held)
                held, size, number = [], 0, number + 1
    if held:
        yield "".join(held)
