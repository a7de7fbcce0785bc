"""Documents -> tokens on disk, prepared once and reused.

The name of a prepared folder is derived from everything that determines its content. It is written under a
temporary name and renamed when complete, so it exists completely or not at all, also when two jobs prepare at
the same time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tf_dist import progress
from tf_dist.atomic_io import sha256_of, sync_folder, temporary_name, write_whole
from tf_dist.config.batch import BatchOptions
from tf_dist.config.data import DataOptions
from tf_dist.data.corpus import Corpus
from tf_dist.data.decoding import Counts
from tf_dist.data.prepared_dataset import FORMAT, SIDES, VERSION, Prepared, open_prepared, publish
from tf_dist.data.sources import SourceFile, cap, files_sha256, find_files, fingerprint
from tf_dist.data.split import check_fraction, choose_validation, train_characters
from tf_dist.data.tokenizer import (
    Ids,
    Tokenizer,
    UnknownCharacter,
    check_vocab_size,
    load_tokenizer,
    train_tokenizer,
)
from tf_dist.data.tokens import TokenWriter, content_sha256, map_tokens, sample_sha256, token_dtype
from tf_dist.errors import DataError

LOG = logging.getLogger(__name__)
KINDS = ("byte", "char", "bpe")
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class PrepareOptions:
    """Options that determine the content of a prepared corpus, besides its files."""

    text_column: str
    tokenizer: str
    vocab_size: int
    val_fraction: float
    seed: int
    errors: str
    max_bytes: int


@dataclass
class PreparePlan:
    """Results of the first pass over a corpus.

    documents: how many. in_val: True for validation documents, shape (documents,). cut_at: for a
    single document, the number of its training characters; -1 if documents are split as units.
    counts: of that pass.
    """

    documents: int
    in_val: npt.NDArray[np.bool_]
    cut_at: int
    counts: Counts


@dataclass(frozen=True)
class Text:
    """A chunk of a document, and its side of the split, 0 for train and 1 for val; ``ends`` the document.

    where: file, and row, of the document. characters, lines: of the document, before this chunk.
    """

    text: str
    side: int
    ends: bool
    where: str
    characters: int
    lines: int


def prepare(
    sources: Sequence[str],
    *,
    text_column: str = DataOptions.text_column,
    tokenizer: str = DataOptions.tokenizer,
    vocab_size: int = DataOptions.vocab_size,
    val_fraction: float = DataOptions.val_fraction,
    seed: int = BatchOptions.seed,
    errors: str = DataOptions.errors,
    max_bytes: int = DataOptions.max_bytes,
    folder: Path | str = DataOptions.prepared_dir,
) -> Prepared:
    """Tokenize a corpus, or reuse the folder that was prepared before from the same files.

    Args:
        sources: ``stdlib``, files, globs, folders.
        text_column: which column of a table holds the text.
        tokenizer: ``byte``, ``char``, ``bpe`` (trained on the training documents; ``char`` on all, so
            that validation holds no unknown character), or the path of a ``tokenizer.json``.
        vocab_size: see `train_tokenizer`.
        val_fraction: fraction of the text's bytes for validation. A single document is cut at that fraction
            of its characters, as nanoGPT does, and then no end-of-text is added.
        seed: chooses the validation documents.
        errors: ``strict`` or ``replace``, for invalid UTF-8.
        max_bytes: at most this much of ``stdlib``; 0 is all.
        folder: where prepared folders are kept.

    Raises:
        DataError: the text cannot be read, is too short to be split, or cannot be written.
        UsageError: an invalid option.
    """
    check_fraction(val_fraction)
    options = PrepareOptions(text_column, tokenizer, vocab_size or 0, val_fraction, seed, errors, max_bytes)
    corpus = Corpus(sources, text_column=text_column, errors=errors, max_bytes=max_bytes)
    key = _key(options, corpus.files)
    target = Path(folder) / f"{name_of(corpus.sources[0])}-{key[:12]}"
    if target.exists():
        try:
            return open_prepared(target)
        except DataError as error:
            LOG.warning(f"preparing again: {error}")
    return _make(corpus, options, key, target)


def name_of(source: str) -> str:
    """What a prepared folder is called, from the first source."""
    stem = Path(source).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[:40].strip("-") or "data"


def _key(options: PrepareOptions, files: Sequence[SourceFile]) -> str:
    parts: dict[str, Any] = {"version": VERSION, "options": dataclasses.asdict(options)}
    if options.tokenizer not in KINDS:
        # The file's content counts, not its name.
        parts["options"]["tokenizer"] = _file_sha256(options.tokenizer)
    parts["files"] = fingerprint(files)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _file_sha256(tokenizer: str) -> str:
    if not Path(tokenizer).is_file():
        raise DataError(
            f"no tokenizer {tokenizer!r}: it is none of {' '.join(KINDS)}, and no file of that name."
        )
    try:
        return sha256_of(Path(tokenizer))
    except OSError as error:
        raise DataError(f"cannot read {tokenizer}: {error.strerror}. Check its permissions.") from error


def _make(corpus: Corpus, options: PrepareOptions, key: str, target: Path) -> Prepared:
    temporary = temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        _write(corpus, options, key, temporary)
        sync_folder(temporary)
        return publish(temporary, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write prepared tokens to {target.parent}: {reason}. Choose another --prepared-dir."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(corpus: Corpus, options: PrepareOptions, key: str, folder: Path) -> None:
    plan = _plan(corpus, options)
    tokenizer = _tokenizer(corpus, options, plan)
    tokenizer.save(folder / "tokenizer.json")
    facts = _write_tokens(corpus, plan, tokenizer, folder)
    _check_unchanged(corpus, options)
    counts = plan.counts
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "key": key,
        "sources": list(corpus.sources),
        "files": len(corpus.files),
        **facts,
        "split": _split_name(plan),
        "seed": options.seed,
        "val_fraction": options.val_fraction,
        "dtype": token_dtype(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_sha256": sha256_of(folder / "tokenizer.json"),
        "content_sha256": content_sha256(folder / "train.bin", folder / "val.bin"),
        "sample_sha256": {
            side: sample_sha256(map_tokens(folder / f"{side}.bin", token_dtype(tokenizer.vocab_size)))
            for side in SIDES
        },
        "files_sha256": files_sha256(corpus.files),
        "replaced": counts.replaced,
        "skipped": {name: getattr(counts, name) for name in ("nulls", "empty", "not_utf8", "duplicates")},
    }
    spelled = json.dumps(meta, indent=1, ensure_ascii=False)
    # File names may contain invalid UTF-8: Python writes it in JSON syntax, \udce9.
    write_whole(folder / "meta.json", spelled.encode("utf-8", "backslashreplace"))


def _split_name(plan: PreparePlan) -> str:
    if plan.cut_at >= 0:
        return "position"
    return "document" if plan.in_val.any() else "none"


def _plan(corpus: Corpus, options: PrepareOptions) -> PreparePlan:
    """The first pass: sizes only, 8 bytes per document."""
    counts, sizes, size, characters = Counts(), [], 0, 0
    with progress.task("reading the text", _size_on_disk(corpus), "bytes") as task:
        for piece in corpus.pieces(counts):
            size += len(piece.text.encode())
            characters += len(piece.text)
            if piece.last:
                sizes.append(size)
                size = 0
            task.done = counts.text_bytes
    in_val = choose_validation(np.array(sizes, dtype=np.int64), options.val_fraction, options.seed)
    cut_at = -1
    if len(sizes) == 1 and options.val_fraction:
        cut_at = train_characters(characters, options.val_fraction)
        if not 0 < cut_at < characters:
            raise DataError(
                f"the only document has the length {characters}: too short to split. "
                "Use --val-fraction 0, or more text."
            )
        LOG.info(
            f"one document: its first {cut_at:,} characters are for training, "
            f"the last {characters - cut_at:,} for validation"
        )
    LOG.info(f"{len(sizes):,} document{'s' * (len(sizes) != 1)}, {sum(sizes):,} bytes of text")
    for line in left_out(
        corpus.passed_over, {"documents without text": counts.nulls + counts.empty}, counts.replaced
    ):
        LOG.info(line)
    return PreparePlan(len(sizes), in_val, cut_at, counts)


def left_out(passed_over: Counter[str], others: Mapping[str, int], replaced: int) -> Iterator[str]:
    """Messages about what is skipped or changed.

    Args:
        passed_over: numbers of files, by suffix.
        others: numbers of what else is left out, by what it is.
        replaced: places with bytes that are not UTF-8.
    """
    if passed_over:
        kinds = ", ".join(
            f"{count:,} {suffix or 'without one'}" for suffix, count in passed_over.most_common(5)
        )
        more = ", ..." if len(passed_over) > 5 else ""
        yield f"files of other suffixes, passed over: {kinds}{more}"
    yield from (f"{what}, left out: {count:,}" for what, count in others.items() if count)
    if replaced:
        yield f"bytes that are not UTF-8, now U+FFFD: in {replaced:,} places"


def _tokenizer(corpus: Corpus, options: PrepareOptions, plan: PreparePlan) -> Tokenizer:
    if options.tokenizer not in KINDS:
        tokenizer = load_tokenizer(options.tokenizer)
        check_vocab_size(options.tokenizer, options.vocab_size, tokenizer.vocab_size)
        return tokenizer
    texts = (part.text for part in _texts(corpus, plan) if options.tokenizer == "char" or part.side == 0)
    with progress.task("reading text for the tokenizer", plan.counts.text_bytes, "bytes") as task:
        tokenizer = train_tokenizer(options.tokenizer, _read_by(task, texts), options.vocab_size)
    LOG.info(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    return tokenizer


def _read_by(task: progress.ProgressTask, texts: Iterator[str]) -> Iterator[str]:
    """The texts, with progress; the duration of tokenizer training is not known in advance."""
    for text in texts:
        yield text
        task.advance(len(text.encode()))
    task.title, task.total, task.done = "training the tokenizer", 0, 0


def _size_on_disk(corpus: Corpus) -> int:
    """Bytes of the files, about the size of their text; 0 if some are compressed."""
    packed = any(str(file.path).lower().endswith((".gz", ".parquet")) for file in corpus.files)
    return 0 if packed else sum(file.size_bytes for file in corpus.files)


def _texts(corpus: Corpus, plan: PreparePlan) -> Iterator[Text]:
    """The chunks of the corpus, each with its side of the split."""
    document, characters, lines = 0, 0, 0
    for piece in corpus.pieces(Counts()):
        if document >= plan.documents:
            raise DataError("there are more documents than a moment ago: the data changed. Try again.")
        if plan.cut_at < 0:
            side = int(plan.in_val[document])
            # A single document has no other one from which end-of-text would separate it.
            ends = piece.last and plan.documents > 1
            yield Text(piece.text, side, ends, piece.where, characters, lines)
        else:
            at = min(max(plan.cut_at - characters, 0), len(piece.text))
            train, val = piece.text[:at], piece.text[at:]
            if train:
                yield Text(train, 0, False, piece.where, characters, lines)
            if val:
                yield Text(val, 1, False, piece.where, characters + at, lines + train.count("\n"))
        characters = 0 if piece.last else characters + len(piece.text)
        lines = 0 if piece.last else lines + piece.text.count("\n")
        document += piece.last


def _write_tokens(corpus: Corpus, plan: PreparePlan, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    dtype = token_dtype(tokenizer.vocab_size)
    text_bytes = [0, 0]
    end = np.array([tokenizer.end_of_text], dtype=np.uint32)
    with TokenWriter(folder / "train.bin", dtype) as train, TokenWriter(folder / "val.bin", dtype) as val:
        writers = (train, val)
        for batch in _counted_batches(corpus, plan):
            for part, ids in zip(batch, _encode(tokenizer, batch), strict=True):
                writers[part.side].append(ids)
                text_bytes[part.side] += len(part.text.encode())
                if part.ends:
                    writers[part.side].append(end)
    in_val = int(plan.in_val.sum()) if plan.cut_at < 0 else 1
    if sum(text_bytes) != plan.counts.text_bytes:
        raise DataError("the text is not the one of a moment ago: the data changed. Try again.")
    return {
        "documents": {"train": max(1, plan.documents - in_val), "val": in_val},
        "tokens": {"train": train.tokens, "val": val.tokens},
        "text_bytes": {"train": text_bytes[0], "val": text_bytes[1]},
    }


def _counted_batches(corpus: Corpus, plan: PreparePlan) -> Iterator[list[Text]]:
    with progress.task("tokenizing", plan.counts.text_bytes, "bytes") as task:
        for batch in _batches(_texts(corpus, plan)):
            yield batch
            task.advance(sum(len(part.text.encode()) for part in batch))


def _batches(texts: Iterator[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text.text)
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: list[Text]) -> list[Ids]:
    try:
        return tokenizer.encode_batch([part.text for part in batch])
    except DataError:
        for part in batch:
            try:
                tokenizer.encode(part.text)
            except UnknownCharacter as error:
                raise DataError(f"{part.where}: {error.said(part.characters, part.lines)}") from error
        raise


def _check_unchanged(corpus: Corpus, options: PrepareOptions) -> None:
    """Refuse a corpus that changed while it was read: its key would be wrong."""
    now = fingerprint(cap(find_files(corpus.sources), options.max_bytes))
    for was, is_now in itertools.zip_longest(fingerprint(corpus.files), now):
        if was != is_now:
            name = (was or is_now)[0]
            raise DataError(f"{name} changed while it was read. Wait until it is written, then try again.")
