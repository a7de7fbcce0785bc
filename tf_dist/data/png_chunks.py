"""Checks of a PNG file before it is decoded: its size in pixels, and that all of them are there.

Pillow fills pixels that are missing with black, without a word, where the compressed stream ends early.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from tf_dist.errors import DataError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# 1 KB of PNG can stand for gigabytes of pixels. As many as a picture of 4096 x 4096.
PIXELS_LIMIT = 1 << 24
HEADER_BYTES = 13
SAMPLES_PER_PIXEL = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type
# Passes of an interlaced picture: first column and row, distance of columns and rows.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def check_png(data: bytes, said: str) -> None:
    """Check the chunks of a PNG file (PNG specification, W3C 2003, sections 5, 8 and 9).

    Args:
        data: all of the file.
        said: its name, and perhaps the row that names it, for error messages.

    Raises:
        DataError: no PNG file, too many pixels, cut off, or with fewer or more pixels than its header says.
    """
    if not data.startswith(SIGNATURE):
        raise DataError(f"{said} is not a PNG file. Convert it: convert IN OUT.png")
    chunks = list(_chunks(data))
    names = [name for name, _ in chunks]
    header = chunks[0][1] if chunks else b""
    if not names or names[0] != b"IHDR" or names.count(b"IHDR") > 1 or len(header) != HEADER_BYTES:
        raise DataError(f"{said} is a damaged PNG file: not one header. Get a whole copy.")
    if names[-1] != b"IEND":
        raise DataError(f"{said} is a damaged PNG file: it is cut off. Get a whole copy.")
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    if width * height > PIXELS_LIMIT:
        raise DataError(
            f"{said} has {width:,} x {height:,} pixels, more than {PIXELS_LIMIT:,}. Make it smaller first."
        )
    expected = _raw_bytes(width, height, header[8] * SAMPLES_PER_PIXEL.get(header[9], 0), bool(header[12]))
    try:
        # Of a stream that is too long, no more than one byte too many.
        inflater = zlib.decompressobj()
        found = len(
            inflater.decompress(b"".join(part for name, part in chunks if name == b"IDAT"), expected + 1)
        )
    except zlib.error as error:
        raise DataError(f"{said} is a damaged PNG file: {error}. Get a whole copy.") from error
    if found != expected:
        what = "fewer" if found < expected else "more"
        raise DataError(f"{said} is a damaged PNG file: it has {what} pixels than its header says.")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and contents of each chunk that is whole, up to the end chunk. Pillow checks their checksums."""
    at = len(SIGNATURE)
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            return
        name = data[at + 4 : at + 8]
        yield name, data[at + 8 : at + 8 + size]
        if name == b"IEND":
            return
        at += 12 + size


def _raw_bytes(width: int, height: int, bits: int, interlaced: bool) -> int:
    """Bytes of all scanlines, each with its filter byte, before compression."""
    total = 0
    for column, row, columns, rows in ADAM7 if interlaced else ((0, 0, 1, 1),):
        pixels, lines = -(-(width - column) // columns), -(-(height - row) // rows)
        if pixels > 0 and lines > 0:
            total += lines * (1 + -(-pixels * bits // 8))
    return total
