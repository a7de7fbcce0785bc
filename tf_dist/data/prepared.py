"""A prepared corpus on disk: what its folder holds, and how it is checked before it is trusted.

The folder: ``train.bin`` and ``val.bin`` (tokens), ``tokenizer.json``, ``meta.json``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tf_dist.atomic_io import read_capped, sha256_of
from tf_dist.data.tokenizer import FILE_LIMIT_BYTES as TOKENIZER_LIMIT_BYTES
from tf_dist.data.tokenizer import Tokenizer, load_tokenizer
from tf_dist.data.tokens import DTYPES, LARGEST_VOCAB, TokenArray, content_sha256, map_tokens
from tf_dist.errors import DataError
from tf_dist.untrusted_files import parsed_json

FORMAT = "tf_dist tokens"
VERSION = 1
META_LIMIT_BYTES = 16 << 20
SIDES = ("train", "val")
Stamp = tuple[int, ...]
SPLITS = ("none", "document", "position")


@dataclass(frozen=True)
class Prepared:
    """A corpus as tokens.

    path: its folder. meta: what ``meta.json`` says. train, val: token ids, shape (tokens,), mapped
    read-only; ``val`` is empty when nothing was kept for validation. stamps: of their files, when opened.
    """

    path: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    train: TokenArray
    val: TokenArray
    stamps: dict[str, Stamp] = field(default_factory=dict)

    def tokenizer_json(self) -> str:
        """The file of the tokenizer, as it is. Raises `DataError` where it cannot be read any more."""
        path = self.path / "tokenizer.json"
        return read_capped(path, TOKENIZER_LIMIT_BYTES).decode("utf-8", "surrogateescape")

    def check_unchanged(self) -> None:
        """See whether the mapped files were written to since they were opened; a look at their times, mostly.

        Files that were replaced as a whole do no harm: what is mapped stays what it was.

        Raises:
            DataError: the tokens are others than before.
        """
        now = {side: _stamp(self.path / f"{side}.bin") for side in self.stamps}
        touched = [side for side, stamp in now.items() if stamp and self.stamps[side] != stamp]
        if any(now[side][0] == self.stamps[side][0] for side in touched):
            self.verify()
        self.stamps.update({side: now[side] for side in touched})

    def verify(self) -> None:
        """Read all tokens.

        Raises:
            DataError: they are others than when they were prepared.
        """
        files = [self.path / f"{side}.bin" for side in SIDES]
        try:
            found = content_sha256(*files)
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}. Prepare again.") from error
        if found != self.meta["content_sha256"]:
            raise DataError(
                f"the tokens in {self.path} have changed since they were prepared: somebody has written to "
                f"{files[0].name} or {files[1].name}. Delete {self.path}, and start the same command again"
            )


def open_prepared(path: Path | str) -> Prepared:
    """Open a prepared folder, after checking its facts against its files.

    Raises:
        DataError: something is missing, damaged or of another version; prepare it again.
    """
    folder = Path(path)
    meta = read_meta(folder)
    if sha256_of_file(folder / "tokenizer.json") != meta["tokenizer_sha256"]:
        raise DataError(f"{folder / 'tokenizer.json'} is not the tokenizer of these tokens. Prepare again.")
    arrays = {side: map_tokens(folder / f"{side}.bin", meta["dtype"]) for side in SIDES}
    for side, array in arrays.items():
        if len(array) != meta["tokens"][side]:
            raise DataError(
                f"{folder / side}.bin holds {len(array)} tokens, meta.json says {meta['tokens'][side]}. "
                f"Delete {folder} and prepare again."
            )
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise DataError(f"{folder}: the tokenizer and meta.json differ in vocab_size. Prepare again.")
    stamps = {side: _stamp(folder / f"{side}.bin") for side in SIDES}
    return Prepared(folder, meta, tokenizer, arrays["train"], arrays["val"], stamps)


def _stamp(path: Path) -> Stamp:
    """Inode, size and time of the last change of a file; nothing where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def sha256_of_file(path: Path) -> str:
    """`sha256_of`, with a `DataError` when the file cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Prepare the data again.") from error


def read_meta(folder: Path) -> dict[str, Any]:
    """The facts about a prepared corpus, every key checked.

    Raises:
        DataError: not there, too large, or not what this version writes.
    """
    path = folder / "meta.json"
    try:
        meta = parsed_json(read_capped(path, META_LIMIT_BYTES))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged: {error}. Delete {folder} and prepare again.") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path} is damaged: not an object. Delete {folder} and prepare again.")
    if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise DataError(
            f"{path} is of format {meta.get('format')!r} version {meta.get('version')!r}; "
            f"this program reads {FORMAT!r} version {VERSION}. Prepare the data again."
        )
    wrong = [key for key, right in CHECKS.items() if key not in meta or not right(meta[key])]
    wrong += sorted(set(meta) - set(CHECKS))
    if wrong:
        keys = ", ".join(map(str, wrong[:5]))
        raise DataError(f"{path}: missing, unknown or wrong: {keys}. Delete {folder} and prepare again.")
    return meta


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 1 << 12


def _are_counts(*names: str) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, dict) and set(value) == set(names) and all(map(_is_count, value.values()))

    return check


def _is_sources(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


# Every key of meta.json, and what its value has to be.
CHECKS: dict[str, Callable[[Any], bool]] = {
    "format": _is_text,
    "version": _is_count,
    "key": _is_sha256,
    "sources": _is_sources,
    "files": _is_count,
    "documents": _are_counts(*SIDES),
    "tokens": _are_counts(*SIDES),
    "text_bytes": _are_counts(*SIDES),
    "split": lambda value: value in SPLITS,
    "seed": lambda value: type(value) is int,
    "val_fraction": lambda value: type(value) in (int, float) and 0 <= value < 1,
    "dtype": lambda value: value in DTYPES,
    "vocab_size": lambda value: _is_count(value) and 0 < value <= LARGEST_VOCAB,
    "end_of_text": _is_count,
    "tokenizer_kind": _is_text,
    "tokenizer_sha256": _is_sha256,
    "content_sha256": _is_sha256,
    "replaced": _is_count,
    "skipped": _are_counts("nulls", "empty", "not_utf8", "duplicates"),
}
