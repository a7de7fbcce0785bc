"""A prepared corpus on disk: content of its folder, and its validation.

The folder: ``train.bin`` and ``val.bin`` (tokens, or the rows of a task), ``tokenizer.json``, ``meta.json``;
for a task also ``held_out.jsonl``, the cells of held-out rows by role.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from tf_dist.atomic_io import read_capped, sha256_of, sync_folder, temporary_name
from tf_dist.data.mixture import MixtureRows
from tf_dist.data.rows import Examples, Rows
from tf_dist.data.sources import SUFFIXES, cap, files_sha256, find_files
from tf_dist.data.tokenizer import FILE_LIMIT_BYTES as TOKENIZER_LIMIT_BYTES
from tf_dist.data.tokenizer import Tokenizer, load_tokenizer
from tf_dist.data.tokens import (
    LARGEST_VOCAB,
    Sequences,
    TokenArray,
    content_sha256,
    map_tokens,
    sample_sha256,
)
from tf_dist.errors import DataError
from tf_dist.untrusted_files import opened_to_lock, parsed_json

FORMAT = "tf_dist tokens"
EXAMPLES = "tf_dist examples"
HELD_OUT = "held_out.jsonl"
MIXTURE = "tf_dist mixture"
# 2: digests of a sample of the tokens, and of the files they were made from; tables are read strictly.
VERSION = 2
META_LIMIT_BYTES = 16 << 20
SIDES = ("train", "val")
Stamp = tuple[int, ...]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Text = Annotated[str, msgspec.Meta(max_length=4095)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
OfSides = Annotated[dict[Literal["train", "val"], Count], msgspec.Meta(min_length=2)]
DigestsOfSides = Annotated[dict[Literal["train", "val"], Sha256], msgspec.Meta(min_length=2)]
Reason = Literal["nulls", "empty", "not_utf8", "duplicates"]
# Of what is wrong with a file that may be anybody's.
LONGEST_REASON = 300


class Facts(msgspec.Struct, forbid_unknown_fields=True):
    """Every key of meta.json, and what its value has to be."""

    format: Text
    version: Count
    key: Sha256
    sources: Annotated[list[Text], msgspec.Meta(min_length=1)]
    files: Count
    documents: OfSides
    tokens: OfSides
    text_bytes: OfSides
    split: Literal["none", "document", "position"]
    seed: int
    val_fraction: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, msgspec.Meta(gt=0, le=LARGEST_VOCAB)]
    end_of_text: Count
    tokenizer_kind: Text
    tokenizer_sha256: Sha256
    content_sha256: Sha256
    sample_sha256: DigestsOfSides
    files_sha256: Sha256
    replaced: Count
    skipped: Annotated[dict[Reason, Count], msgspec.Meta(min_length=4)]


class ExampleFacts(Facts, forbid_unknown_fields=True):
    """Of the rows of a task: also their shape, their number, what was cut off, and labels."""

    dtype: Literal["int32"]  # type: ignore[assignment]
    task: Text
    words: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    targets: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    rows: OfSides
    counted: OfSides
    cut: dict[Literal["source", "target"], Count]
    labels: list[Text]
    suffixes: list[Text]
    held_out_sha256: Sha256


class PartFacts(msgspec.Struct, forbid_unknown_fields=True):
    """Of a corpus of a mixture; its tokens follow those of the corpora before it."""

    name: Text
    weight: Annotated[float, msgspec.Meta(gt=0, le=1)]
    split: Literal["none", "document", "position"]
    documents: OfSides
    tokens: OfSides
    text_bytes: OfSides


class MixtureFacts(Facts, forbid_unknown_fields=True):
    """Of a mixture of corpora: also each of them. The hash of the content covers them."""

    mixture: Annotated[list[PartFacts], msgspec.Meta(min_length=1)]


# The facts of each format, and its version.
FORMATS: dict[str, tuple[int, type[Facts]]] = {
    FORMAT: (VERSION, Facts),
    EXAMPLES: (1, ExampleFacts),
    MIXTURE: (1, MixtureFacts),
}


def spelled_mixture(mixture: list[dict[str, Any]] | None) -> bytes:
    """The corpora of a mixture, as the hash of the content covers them; empty if there is none."""
    return json.dumps(mixture, sort_keys=True).encode() if mixture else b""


@dataclass(frozen=True)
class Prepared:
    """A tokenized corpus.

    path: its folder. meta: content of ``meta.json``. train, val: token ids, shape (tokens,), mapped
    read-only; ``val`` is empty without a validation split. stamps: of their files, when opened.
    """

    path: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    train: TokenArray
    val: TokenArray
    stamps: dict[str, Stamp] = field(default_factory=dict)

    def rows(self, side: str, seq_len: int) -> Rows:
        """One side of the split as rows; those of a language model have ``seq_len`` tokens."""
        tokens = {"train": self.train, "val": self.val}[side]
        if self.meta["format"] == EXAMPLES:
            return Examples(tokens, self.meta["words"], self.meta["targets"])
        if self.meta["format"] == MIXTURE:
            parts = [(one["name"], one["weight"], one["tokens"][side]) for one in self.meta["mixture"]]
            return MixtureRows(tokens, seq_len, parts)
        return Sequences(tokens, seq_len)

    def tokenizer_json(self) -> str:
        """Content of the tokenizer's file. Raises `DataError` if it cannot be read any more."""
        path = self.path / "tokenizer.json"
        return read_capped(path, TOKENIZER_LIMIT_BYTES).decode("utf-8", "surrogateescape")

    def check_unchanged(self) -> None:
        """Check whether the mapped files were written to since they were opened, mostly by their times.

        Replacing a file is harmless: the mapping keeps the old one.

        Raises:
            DataError: the tokens have changed.
        """
        now = {side: _stamp(self.path / f"{side}.bin") for side in self.stamps}
        touched = [side for side, stamp in now.items() if stamp and self.stamps[side] != stamp]
        if any(now[side][0] == self.stamps[side][0] for side in touched):
            self.verify()
        self.stamps.update({side: now[side] for side in touched})

    def verify(self) -> None:
        """Read and compare all tokens.

        Raises:
            DataError: they have changed since they were prepared.
        """
        files = [self.path / f"{side}.bin" for side in SIDES]
        try:
            found = content_sha256(*files, more=spelled_mixture(self.meta.get("mixture")))
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}. Prepare again.") from error
        if found != self.meta["content_sha256"]:
            raise _changed(self.path, f"{files[0].name} or {files[1].name}")


def open_prepared(path: Path | str) -> Prepared:
    """Open a prepared folder, after checking its metadata against its files.

    Raises:
        DataError: a file is missing, damaged or of another version, or the tokens have changed since they
            were prepared (a sample of them is checked if they are many); prepare it again.
    """
    folder = Path(path)
    meta = read_meta(folder)
    if sha256_of_file(folder / "tokenizer.json") != meta["tokenizer_sha256"]:
        raise DataError(f"{folder / 'tokenizer.json'} is not the tokenizer of these tokens. Prepare again.")
    if meta["format"] == EXAMPLES and sha256_of_file(folder / HELD_OUT) != meta["held_out_sha256"]:
        raise _changed(folder, HELD_OUT)
    arrays = {side: map_tokens(folder / f"{side}.bin", meta["dtype"]) for side in SIDES}
    for side, array in arrays.items():
        if len(array) != meta["tokens"][side]:
            raise DataError(
                f"{folder / side}.bin holds {len(array)} tokens, meta.json says {meta['tokens'][side]}. "
                f"Delete {folder} and prepare again."
            )
    for side, array in arrays.items():
        # Small ones are read completely: the metadata alone does not prove that tokens are trainable.
        if sample_sha256(array) != meta["sample_sha256"][side]:
            raise _changed(folder, f"{side}.bin")
        if sum(one["tokens"][side] for one in meta.get("mixture", [])) not in (0, len(array)):
            raise DataError(
                f"{folder / 'meta.json'} is damaged: its mixture has other tokens. Prepare again."
            )
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
    """Find the prepared corpus with this content and tokenizer in a folder of prepared folders; or None.

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
        except DataError:  # of another version, or damaged: ignored
            continue
    return None


def publish(temporary: Path, target: Path) -> Prepared:
    """Rename a complete folder, unless another process was first: then use that one's.

    Raises:
        OSError: it cannot be renamed.
    """
    with _locked(target.parent):
        if target.exists():
            try:
                return open_prepared(target)
            except DataError:
                # A damaged older one. Renamed first, so that no process sees it half deleted.
                trash = temporary_name(target)
                os.rename(target, trash)
                shutil.rmtree(trash, ignore_errors=True)
        os.rename(temporary, target)
        sync_folder(target.parent)
        return open_prepared(target)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time check, remove and rename; the lock ends with the process."""
    with os.fdopen(opened_to_lock(folder / ".lock"), "rb") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: rely on the rename alone
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def files_changed(corpus: Prepared, max_bytes: int) -> str:
    """Message about how the source files of a corpus have changed; empty if they have not.

    Args:
        corpus: that was prepared.
        max_bytes: as it was given to `prepare`.
    """
    sources = corpus.meta["sources"]
    shown = " ".join(sources[:3]) + (" ..." if len(sources) > 3 else "")
    try:
        files = cap(find_files(sources, None, corpus.meta.get("suffixes", SUFFIXES)), max_bytes)
    except DataError as error:
        return f"the corpus cannot be read any more ({error})"
    return (
        ""
        if files_sha256(files) == corpus.meta["files_sha256"]
        else f"the corpus has changed ({shown}: other sizes or times)"
    )


def _stamp(path: Path) -> Stamp:
    """Inode, size and modification time of a file; empty if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def sha256_of_file(path: Path, *, follow: bool = True) -> str:
    """`sha256_of`, with a `DataError` if the file cannot be read."""
    try:
        return sha256_of(path, follow=follow)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Prepare the data again.") from error


def read_meta(folder: Path) -> dict[str, Any]:
    """The metadata of a prepared corpus, every key validated.

    Raises:
        DataError: missing, too large, or not written by this version.
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
    version, facts = FORMATS.get(str(meta.get("format")), FORMATS[FORMAT])
    if meta.get("format") not in FORMATS or meta.get("version") != version:
        raise DataError(
            f"{path} is of format {meta.get('format')!r} version {meta.get('version')!r}; "
            f"this program reads {FORMAT!r} version {VERSION}. Prepare the data again."
        )
    try:
        msgspec.convert(meta, facts)
    except msgspec.ValidationError as error:
        why = str(error)[:LONGEST_REASON]
        raise DataError(f"{path} is damaged: {why}. Delete {folder} and prepare again.") from error
    return meta
