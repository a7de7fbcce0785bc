"""CRC-32 of a part of a file, with sparse holes skipped.

An untrusted file may claim to have any number of gigabytes, of which the disk stores none: the checksum of a
hole's zeros is computed without reading them.
"""

from __future__ import annotations

import os
import zlib

BLOCK_BYTES = 1 << 20
ALL_ONES, POLYNOMIAL = 0xFFFFFFFF, 0xEDB88320  # of zlib's CRC-32, bits reversed


def crc32_of_part(handle: int, begin: int, count: int) -> tuple[int, int]:
    """CRC-32 of ``count`` bytes of a file from ``begin`` on, and how many there were. Raises `OSError`."""
    at, end, crc = begin, min(begin + count, os.fstat(handle).st_size), 0
    while at < end:
        data = min(_next_data(handle, at, end), end)
        crc, at = after_zeros(crc, data - at), data
        block = os.pread(handle, min(BLOCK_BYTES, end - at), at)
        if not block and at < end:  # it was truncated meanwhile
            break
        crc, at = zlib.crc32(block, crc), at + len(block)
    return crc, at - begin


def after_zeros(crc: int, count: int) -> int:
    """CRC-32 after ``count`` zeros are appended to data with this CRC."""
    state, step = crc ^ ALL_ONES, [_after_a_zero(1 << bit) for bit in range(32)]
    while count:  # each bit of the count: the step for twice as many zeros is that step twice
        if count & 1:
            state = _times(step, state)
        step = [_times(step, column) for column in step]
        count >>= 1
    return state ^ ALL_ONES


def _next_data(handle: int, at: int, end: int) -> int:
    try:
        return os.lseek(handle, at, os.SEEK_DATA)
    except OSError:  # a hole up to the end; or not supported by the file system
        return end if _is_hole(handle, at) else at


def _is_hole(handle: int, at: int) -> bool:
    try:
        return os.lseek(handle, at, os.SEEK_HOLE) == at
    except OSError:
        return False


def _after_a_zero(state: int) -> int:
    for _ in range(8):
        state = state >> 1 ^ (POLYNOMIAL if state & 1 else 0)
    return state


def _times(columns: list[int], vector: int) -> int:
    """A matrix over GF(2), by columns, times a vector of bits."""
    product = 0
    while vector:
        lowest = vector & -vector
        product ^= columns[lowest.bit_length() - 1]
        vector ^= lowest
    return product
