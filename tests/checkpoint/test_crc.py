"""Sums of parts of files, with holes and without: those of zlib, and no gigabyte of zeros is read."""

import os
import random
import zlib

import pytest

from tf_dist.checkpoint.crc import after_zeros, crc32_of_part


@pytest.mark.parametrize("count", [0, 1, 2, 3, 255, 4096, 100_003])
def test_zeros_after_something(count):
    crc = zlib.crc32(b"something")
    assert after_zeros(crc, count) == zlib.crc32(bytes(count), crc)


def test_parts_of_a_file_with_holes(tmp_path):
    path, rng = tmp_path / "file", random.Random(1)
    with path.open("wb") as file:
        for at in (0, 1 << 20, 5 << 20):
            file.seek(at)
            file.write(rng.randbytes(70_001))
        file.truncate(9 << 20)
    data = path.read_bytes()
    with path.open("rb") as file:
        for begin, count in [
            (0, len(data)),
            (3, 1 << 21),
            (100_000, 50),
            (6 << 20, 2 << 20),
            (8 << 20, 9 << 20),
        ]:
            part = data[begin : begin + count]
            assert crc32_of_part(file.fileno(), begin, count) == (zlib.crc32(part), len(part))
        assert crc32_of_part(file.fileno(), 20 << 20, 5) == (0, 0)


def test_a_hole_of_terabytes(tmp_path):
    handle = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(handle, 1 << 43)
        assert crc32_of_part(handle, 0, 1 << 43) == (after_zeros(0, 1 << 43), 1 << 43)
    finally:
        os.close(handle)
