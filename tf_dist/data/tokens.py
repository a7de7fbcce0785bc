"""A corpus as one long array of token ids, in a memory-mapped file.

Raw little-endian uint16 (vocabularies up to 65,536) or uint32. Legend: B rows, T tokens in a row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tf_dist.atomic_io import BLOCK_BYTES
from tf_dist.errors import DataError, UsageError
from tf_dist.untrusted_files import opened

TokenArray = npt.NDArray[np.unsignedinteger[Any]]
Batch = npt.NDArray[np.int32]

DTYPES = ("uint16", "uint32")
LARGEST_VOCAB = 1 << 31
# Up to this size all tokens are checked before training; of larger files, a sample of blocks.
SAMPLED_FROM_BYTES = 1 << 26
SAMPLED_BLOCKS = 256
SAMPLED_BLOCK_TOKENS = 1 << 15
NO_TARGET = -1
NO_SEQUENCE = -1


def token_dtype(vocab_size: int) -> str:
    """``uint16`` or ``uint32``: the smaller that holds every id below ``vocab_size``.

    Raises:
        UsageError: ids would not fit the int32 of a batch.
    """
    if not 0 < vocab_size <= LARGEST_VOCAB:
        raise UsageError(f"vocab_size is {vocab_size}: it must be between 1 and {LARGEST_VOCAB}.")
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class TokenWriter:
    """Appends tokens to a new file. ``tokens`` is their number so far. Close it, or use ``with``."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.tokens = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = open(path, "xb")  # __exit__ closes it

    def append(self, ids: npt.NDArray[Any]) -> None:
        """Append ids, shape (tokens,), each below the vocabulary size."""
        self._file.write(ids.astype(self._dtype).tobytes())
        self.tokens += len(ids)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def map_tokens(path: Path, dtype: str) -> TokenArray:
    """Map the tokens of a file, shape (tokens,), read-only into memory.

    Raises:
        DataError: missing, or not an integral number of tokens.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    try:
        with opened(path, follow=True) as file:
            size = os.fstat(file.fileno()).st_size
            if size % kind.itemsize:
                raise DataError(f"{path} is damaged: {size} bytes are no whole number of {dtype} tokens.")
            if not size:
                return np.empty(0, dtype=kind)  # an empty file cannot be mapped
            return np.memmap(file, dtype=kind, mode="r")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Prepare the data again.") from error


def content_sha256(*paths: Path, more: bytes = b"") -> str:
    """The SHA-256 over the bytes of several files, one after the other, each preceded by its size.

    ``more`` is what else belongs to the content, before them.
    """
    digest = hashlib.sha256(more)
    for path in paths:
        with opened(path, follow=True) as file:
            digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def sampled(tokens: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Blocks of tokens with their offsets: all of them, or an evenly spaced sample if there are many.

    The first and the last block are always included.
    """
    starts: Iterable[int] = range(0, len(tokens), SAMPLED_BLOCK_TOKENS)
    if tokens.nbytes > SAMPLED_FROM_BYTES:
        last = len(tokens) - SAMPLED_BLOCK_TOKENS
        starts = (number * last // (SAMPLED_BLOCKS - 1) for number in range(SAMPLED_BLOCKS))
    for start in starts:
        yield start, tokens[start : start + SAMPLED_BLOCK_TOKENS]


def sample_sha256(tokens: npt.NDArray[Any]) -> str:
    """A fast digest of tokens, shape (tokens,): of count, dtype and `sampled` blocks.

    Ranks compare it to detect different data; up to `SAMPLED_FROM_BYTES` it covers every token.
    """
    digest = hashlib.sha256(f"{len(tokens)} {tokens.dtype.str}".encode())
    for _, block in sampled(tokens):
        digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()


def foreign_token(tokens: npt.NDArray[Any], vocab_size: int) -> tuple[int, int] | None:
    """The first id outside 0 .. ``vocab_size`` - 1, and its position, among `sampled`; or None.

    Args:
        tokens: ids, of any shape.
        vocab_size: size of the vocabulary.
    """
    for start, block in sampled(tokens.reshape(-1)):
        wrong = (block < 0) | (block >= vocab_size)
        if wrong.any():
            at = int(np.argmax(wrong))
            return int(block[at]), start + at
    return None


def foreign_tokens_error(token: int, place: int, vocab_size: int) -> DataError:
    """The error for tokens of another tokenizer than the model's."""
    return DataError(
        f"token id {token} at place {place:,} is not in the model's vocabulary of {vocab_size} (0 to "
        f"{vocab_size - 1}): the tokens were made by another tokenizer than the model was made for"
    )


class Sequences:
    """A token array as rows of inputs and targets: window i starts at token i * seq_len.

    The target of a token is the token after it, so windows share no target, and every token but the
    first is a target exactly once. The last window may be short.

    Args:
        tokens: shape (tokens,), memory-mapped or not.
        seq_len: T, tokens in a row.

    Raises:
        UsageError: ``seq_len`` is less than 1.
        DataError: ``tokens`` is not a 1-D array of integers.
    """

    def __init__(self, tokens: npt.NDArray[Any], seq_len: int) -> None:
        if seq_len < 1:
            raise UsageError(f"seq_len is {seq_len}: it must be 1 or more.")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(f"tokens are {tokens.dtype} of shape {tokens.shape}: want one row of integers.")
        self.tokens = tokens
        self.seq_len = seq_len
        self._vocab_size: int | None = None

    def must_be_below(self, vocab_size: int) -> None:
        """Refuse tokens outside a model's vocabulary.

        Raises:
            DataError: an id is negative, or not less than ``vocab_size``. If there are too many tokens to
                check all of them now, `rows` raises it.
        """
        found = foreign_token(self.tokens, vocab_size)
        if found:
            raise foreign_tokens_error(*found, vocab_size)
        self._vocab_size = vocab_size if self.tokens.nbytes > SAMPLED_FROM_BYTES else None

    def __len__(self) -> int:
        return max(0, -(-(len(self.tokens) - 1) // self.seq_len))

    def rows(self, indices: npt.ArrayLike, draw: tuple[int, int] | None = None) -> tuple[Batch, Batch]:
        """The rows of a batch.

        Args:
            indices: shape (B,), window numbers; -1 for a row of padding.
            draw: as in `tf_dist.data.rows.Rows`; nothing is random here.

        Returns:
            x and y, int32 of shape (B, T). For padding, y is -1 and x is 0.

        Raises:
            IndexError: no such window.
            DataError: a token is not in the model's vocabulary, see `must_be_below`.
        """
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if index.size and not (NO_SEQUENCE <= index.min() and index.max() < len(self)):
            raise IndexError(f"windows {index.min()} to {index.max()} asked for, there are {len(self)}")
        shape = (len(index), self.seq_len)
        if not index.size or not len(self):
            return np.zeros(shape, np.int32), np.full(shape, NO_TARGET, np.int32)
        at = index[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        window = self.tokens[np.clip(at, 0, len(self.tokens) - 1)].astype(np.int32)
        if self._vocab_size is not None and (found := foreign_token(window, self._vocab_size)):
            row, place = divmod(found[1], self.seq_len + 1)
            raise foreign_tokens_error(found[0], int(at[row, place]), self._vocab_size)
        has_target = (index[:, None] >= 0) & (at[:, 1:] < len(self.tokens))
        return (
            np.where(has_target, window[:, :-1], 0).astype(np.int32),
            np.where(has_target, window[:, 1:], NO_TARGET).astype(np.int32),
        )
