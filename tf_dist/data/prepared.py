"""A prepared corpus on disk: what its folder holds, and how it is checked before it is trusted.

The folder: ``train.bin`` and ``val.bin`` (tokens), ``tokenizer.json``, ``meta.json``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tf_dist.atomic_io import read_capped, sha256_of, sync_folder, temporary_name
from tf_dist.data.sources import cap, files_sha256, find_files
from tf_dist.data.tokenizer import FILE_LIMIT_BYTES as TOKENIZER_LIMIT_BYTES
from tf_dist.data.tokenizer import Tokenizer, load_tokenizer
from tf_dist.data.tokens import (
    DTYPES,
    LARGEST_VOCAB,
    TokenArray,
    content_sha256,
    map_tokens,
    sample_sha256,
)
from tf_dist.errors import DataError
from tf_dist.untrusted_files import opened_to_lock, parsed_json

FORMAT = "tf_dist tokens"
# 2: digests of a sample of the tokens, and of the files they were made from; tables are read strictly.
VERSION = 2
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
            raise _changed(self.path, f"{files[0].name} or {files[1].name}")


def open_prepared(path: Path | str) -> Prepared:
    """Open a prepared folder, after checking its facts against its files.

    Raises:
        DataError: something is missing, damaged or of another version, or the tokens are others than were
            prepared (where they are many, in a sample of them); prepare it again.
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
    for side, array in arrays.items():
        # Small ones are read as a whole: what meta.json says of them is not enough to train on.
        if sample_sha256(array) != meta["sample_sha256"][side]:
            raise _changed(folder, f"{side}.bin")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise DataError(f"{folder}: the tokenizer and meta.json differ in vocab_size. Prepare again.")
    stamps = {side: _stamp(folder / f"{side}.bin") for side in SIDES}
    return Prepared(folder, meta, tokenizer, arrays["train"], arrays["val"], stamps)


def _changed(folder: Path, files: str) -> DataError:
    folder = folder.absolute()
    return DataError(
        f"the tokens in {folder} have changed since they were prepared: somebody has written to {files}. "
        f"Delete {folder}, and start the same command again"
    )


def find_prepared(folder: Path, content_sha256: str, tokenizer_sha256: str) -> Prepared | None:
    """The prepared corpus with these very tokens, made by this tokenizer, in a folder of such; or None.

    Args:
        folder: as given to `prepare`; it may be missing.
        content_sha256: of the tokens.
        tokenizer_sha256: of the file ``tokenizer.json``.
    """
    wanted = {"content_sha256": content_sha256, "tokenizer_sha256": tokenizer_sha256}
    for path in sorted(folder.glob("[!.]*/meta.json")):
        try:
            meta = read_meta(path.parent)
            if wanted.items() <= meta.items():
                return open_prepared(path.parent)
        except DataError:  # of another version, or damaged: as if it were not there
            continue
    return None


def publish(temporary: Path, target: Path) -> Prepared:
    """Give a whole folder its name, unless another process was first: then use that one's.

    Raises:
        OSError: it cannot be renamed.
    """
    with _locked(target.parent):
        if target.exists():
            try:
                return open_prepared(target)
            except DataError:
                # Damaged, from before. Renamed first, so that nobody meets it half deleted.
                trash = temporary_name(target)
                os.rename(target, trash)
                shutil.rmtree(trash, ignore_errors=True)
        os.rename(temporary, target)
        sync_folder(target.parent)
        return open_prepared(target)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time looks, removes and renames; the lock goes with the process."""
    with os.fdopen(opened_to_lock(folder / ".lock"), "rb") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: the rename alone must do
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def files_changed(corpus: Prepared, max_bytes: int) -> str:
    """Words for what has become of the files that a corpus was made from; empty where they are as they were.

    Args:
        corpus: that was prepared.
        max_bytes: as it was given to `prepare`.
    """
    sources = corpus.meta["sources"]
    shown = " ".join(sources[:3]) + (" ..." if len(sources) > 3 else "")
    try:
        files = cap(find_files(sources), max_bytes)
    except DataError as error:
        return f"the corpus cannot be read any more ({error})"
    return (
        ""
        if files_sha256(files) == corpus.meta["files_sha256"]
        else f"the corpus has changed ({shown}: other sizes or times)"
    )


def _stamp(path: Path) -> Stamp:
    """Inode, size and time of the last change of a file; nothing where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def sha256_of_file(path: Path, *, follow: bool = True) -> str:
    """`sha256_of`, with a `DataError` when the file cannot be read."""
    try:
        return sha256_of(path, follow=follow)
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


def _are_sha256(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == set(SIDES) and all(map(_is_sha256, value.values()))


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
    "sample_sha256": _are_sha256,
    "files_sha256": _is_sha256,
    "replaced": _is_count,
    "skipped": _are_counts("nulls", "empty", "not_utf8", "duplicates"),
}
