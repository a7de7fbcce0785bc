"""Detect file formats and encodings by content, and refuse files that are not UTF-8 text."""

from __future__ import annotations

import codecs
import re

import numpy as np

from tf_dist.errors import DataError

# Longer than any signature here, and than a pointer of git-lfs or git-annex.
HEAD_BYTES = 1024
# Fraction of control characters at one byte position of a code unit that marks it as the high byte ...
HIGH_BYTES_SHARE = 0.6
# ... if the low bytes have at most this fraction, line feeds and tabs included.
LOW_BYTES_SHARE = 0.3
NUL_SHARE = 0.02
LEAST_WIDE_BYTES = 8
# No text has so many in a row: the disk was full, or the machine crashed.
ZEROS = bytes(4096)

POINTERS = (
    (
        re.compile(rb"version https://git-lfs\.github\.com/spec/v1\r?\n(ext-.*\n)*oid "),
        "git-lfs",
        "git lfs pull",
    ),
    (re.compile(rb"/annex/objects/\S+\n?\Z"), "git-annex", "git annex get"),
)
# The longer mark first: that of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
BINARIES = (
    (re.compile(rb"\x1f\x8b\x08"), "compressed by gzip", "Let its name end in .gz"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "compressed by bzip2", "Let its name end in .bz2"),
    (re.compile(rb"\xfd7zXZ\x00"), "compressed by xz", "Let its name end in .xz"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "compressed by zstd", "Let its name end in .zst"),
    (re.compile(rb"PK\x03\x04"), "a zip archive (.zip, .docx, .xlsx, ...)", "Unpack it or export it as text"),
    (re.compile(rb"PAR1\x15"), "a Parquet table", "Let its name end in .parquet"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive", "Unpack it"),
    (re.compile(rb"ARROW1\x00\x00"), "an Arrow file", "Write it as .parquet"),
    (re.compile(rb"SQLite format 3\x00"), "an SQLite database", "Export the table as .csv"),
    (re.compile(rb"\x7fELF"), "a program", "Leave it out"),
    (re.compile(rb"\x89PNG\r\n|GIF8[79]a|\xff\xd8\xff"), "a picture", "Leave it out"),
    (re.compile(rb"%PDF-[12]\.\d"), "a PDF document", "Extract its text (pdftotext)"),
)


def check_is_no_pointer(head: bytes, name: str) -> None:
    """Raise `DataError` if a clone has a pointer in place of the file.

    Args:
        head: the first `HEAD_BYTES` of a file, or all of it.
        name: of the file.
    """
    if len(head) >= HEAD_BYTES:
        return
    for pattern, tool, remedy in POINTERS:
        if pattern.match(head):
            raise DataError(f"{name} is a pointer of {tool}, not the file itself. Fetch it: {remedy}")


def check_is_text(head: bytes, name: str) -> None:
    """Raise `DataError` if a text starts with the signature of another encoding or format."""
    for mark, encoding in MARKS:
        if head.startswith(mark):
            raise DataError(
                f"{name} is not UTF-8: it begins with the byte order mark of {encoding}. "
                f"Convert the file: iconv -f {encoding} -t UTF-8"
            )
    for pattern, what, remedy in BINARIES:
        if pattern.match(head):
            raise DataError(f"{name} is not text: it is {what}. {remedy}")


def check_is_written(block: bytes, offset: int, name: str) -> None:
    """Raise `DataError` for a part of a file that was never written.

    Args:
        block: part of the file.
        offset: of the block.
        name: of the file.
    """
    at = block.find(ZEROS)
    if at >= 0:
        raise DataError(
            f"{name} holds nothing but NUL from byte {offset + at} on, for {len(ZEROS):,} bytes or more: it "
            "was not written to its end. Get a whole copy"
        )


def check_is_narrow(block: bytes, name: str) -> None:
    """Raise `DataError` for UTF-16 or UTF-32 without a byte order mark, which may be valid UTF-8 with NUL.

    In both, the high bytes of most scripts are control characters (0x00 of Latin, 0x04 of Cyrillic, 0x09 of
    Devanagari), at every second position or at three of four; in text with occasional NUL they are not.

    Args:
        block: part of the file, at any offset.
        name: of the file.
    """
    if b"\0" not in block or len(block) < LEAST_WIDE_BYTES:
        return
    signs = np.frombuffer(block[: len(block) // 4 * 4], np.uint8).reshape(-1, 4)
    shares = (signs < 0x20).mean(axis=0)
    high, low = shares >= HIGH_BYTES_SHARE, shares < LOW_BYTES_SHARE
    nul = (signs == 0).mean(axis=0)
    # Spaces and digits have NUL there in every script; lines of single digits and tabs have not.
    if not (high | low).all() or nul[low].max(initial=0) > NUL_SHARE or nul[high].max(initial=0) < NUL_SHARE:
        return
    encodings = {1: "UTF-32", 2: "UTF-16" if bool(high[0]) == bool(high[2]) else ""}
    if encoding := encodings.get(int(low.sum())):
        raise DataError(
            f"{name} is not UTF-8: it looks like {encoding} without a byte order mark (NUL or another "
            f"control character beside every letter). Convert the file: iconv -f {encoding}LE -t UTF-8, or "
            f"{encoding}BE"
        )
