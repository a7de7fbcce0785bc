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
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tf_dist import progress
from tf_dist.atomic_io import sha256_of, sync_folder, temporary_name, write_whole
from tf_dist.config.batch import BatchOptions
from tf_dist.config.data import DataOptions
from tf_dist.data.corpus import Corpus
from tf_dist.data.decoding import Counts
from tf_dist.data.prepared_dataset import (
    FORMAT,
    FORMATS,
    MIXTURE,
    SIDES,
    VERSION,
    Prepared,
    open_prepared,
    publish,
    spelled_mixture,
)
from tf_dist.data.sources import cap, files_sha256, find_files, fingerprint
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
# What is counted of each corpus, by side.
COUNTED = ("documents", "tokens", "text_bytes")
# A text above it is cut where only a part of a corpus is wanted.
LONG_CHARACTERS = 1 << 12
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


class Portion(NamedTuple):
    """A corpus, and its share of a mixture (0: it is the only one), and what the first pass has found."""

    corpus: Corpus
    weight: float
    plan: PreparePlan


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
    weights: Sequence[float] = (),
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
        weights: of a mixture (`tf_dist.data.mixture`), of which each source is a corpus of its own, split by
            itself; empty: the sources are one corpus. The tokenizer is trained on as much of each corpus as
            makes the shares those of the weights (``char``: on all).

    Raises:
        DataError: the text cannot be read, is too short to be split, or cannot be written.
        UsageError: an invalid option.
    """
    check_fraction(val_fraction)
    options = PrepareOptions(text_column, tokenizer, vocab_size or 0, val_fraction, seed, errors, max_bytes)
    groups = [[source] for source in sources] if weights else [sources]
    corpora = [Corpus(group, text_column=text_column, errors=errors, max_bytes=max_bytes) for group in groups]
    key = _key(options, corpora, weights)
    target = Path(folder) / f"{name_of(corpora[0].sources[0])}-{key[:12]}"
    if target.exists():
        try:
            return open_prepared(target)
        except DataError as error:
            LOG.warning(f"preparing again: {error}")
    return _make(corpora, weights, options, key, target)


def name_of(source: str) -> str:
    """What a prepared folder is called, from the first source."""
    stem = Path(source).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[:40].strip("-") or "data"


def _key(options: PrepareOptions, corpora: Sequence[Corpus], weights: Sequence[float]) -> str:
    parts: dict[str, Any] = {"version": VERSION, "options": dataclasses.asdict(options)}
    if options.tokenizer not in KINDS:
        # The file's content counts, not its name.
        parts["options"]["tokenizer"] = _file_sha256(options.tokenizer)
    if weights:
        files = [fingerprint(corpus.files) for corpus in corpora]
        parts["mixture"] = list(zip(weights, files, strict=True))
    else:
        parts["files"] = fingerprint(corpora[0].files)
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


def _make(
    corpora: Sequence[Corpus], weights: Sequence[float], options: PrepareOptions, key: str, target: Path
) -> Prepared:
    temporary = temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        _write(corpora, weights, options, key, temporary)
        sync_folder(temporary)
        return publish(temporary, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write prepared tokens to {target.parent}: {reason}. Choose another --prepared-dir."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    corpora: Sequence[Corpus], weights: Sequence[float], options: PrepareOptions, key: str, folder: Path
) -> None:
    portions = [
        Portion(corpus, weight, _plan(corpus, options))
        for corpus, weight in zip(corpora, weights or [0.0], strict=True)
    ]
    tokenizer = _tokenizer(portions, options)
    tokenizer.save(folder / "tokenizer.json")
    each = _write_tokens(portions, tokenizer, folder)
    for corpus in corpora:
        _check_unchanged(corpus, options)
    sources = [source for corpus in corpora for source in corpus.sources]
    files = cap(find_files(sources), options.max_bytes)
    dtype = token_dtype(tokenizer.vocab_size)
    mixture = _mixture(portions, each) if weights else None
    meta = {
        "format": MIXTURE if mixture else FORMAT,
        "version": FORMATS[MIXTURE][0] if mixture else VERSION,
        "key": key,
        "sources": sources,
        "files": len(files),
        **{name: {side: sum(one[name][side] for one in each) for side in SIDES} for name in COUNTED},
        "split": _split_name([portion.plan for portion in portions]),
        "seed": options.seed,
        "val_fraction": options.val_fraction,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_sha256": sha256_of(folder / "tokenizer.json"),
        "content_sha256": content_sha256(
            folder / "train.bin", folder / "val.bin", more=spelled_mixture(mixture)
        ),
        "sample_sha256": {side: sample_sha256(map_tokens(folder / f"{side}.bin", dtype)) for side in SIDES},
        "files_sha256": files_sha256(files),
        "replaced": sum(portion.plan.counts.replaced for portion in portions),
        "skipped": {
            name: sum(getattr(portion.plan.counts, name) for portion in portions)
            for name in ("nulls", "empty", "not_utf8", "duplicates")
        },
        **({"mixture": mixture} if mixture else {}),
    }
    spelled = json.dumps(meta, indent=1, ensure_ascii=False)
    # File names may contain invalid UTF-8: Python writes it in JSON syntax, \udce9.
    write_whole(folder / "meta.json", spelled.encode("utf-8", "backslashreplace"))


def _mixture(portions: Sequence[Portion], each: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The corpora of a mixture, as they are in meta.json, each under a name of its own."""
    made: list[dict[str, Any]] = []
    for (corpus, weight, plan), counts in zip(portions, each, strict=True):
        name, taken = name_of(corpus.sources[0]), {one["name"] for one in made}
        name = next(
            one
            for one in itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
            if one not in taken
        )
        made.append({"name": name, "weight": weight, "split": _split_name([plan]), **counts})
    return made


def _split_name(plans: Sequence[PreparePlan]) -> str:
    if any(plan.in_val.any() for plan in plans):
        return "document"
    return "position" if any(plan.cut_at >= 0 for plan in plans) else "none"


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


def _tokenizer(portions: Sequence[Portion], options: PrepareOptions) -> Tokenizer:
    if options.tokenizer not in KINDS:
        tokenizer = load_tokenizer(options.tokenizer)
        check_vocab_size(options.tokenizer, options.vocab_size, tokenizer.vocab_size)
        return tokenizer
    total = sum(portion.plan.counts.text_bytes for portion in portions)
    with progress.task("reading text for the tokenizer", total, "bytes") as task:
        texts = _read_by(task, _of_training(portions, options.tokenizer))
        tokenizer = train_tokenizer(options.tokenizer, texts, options.vocab_size)
    LOG.info(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    return tokenizer


def _of_training(portions: Sequence[Portion], kind: str) -> Iterator[str]:
    """The texts that a tokenizer is trained on: of a mixture, of each corpus its share."""
    if kind == "char":
        yield from (text.text for portion in portions for text in _texts(portion.corpus, portion.plan))
        return
    # The corpus that is shortest for its weight is taken completely, and so much of the others.
    wanted = [portion.weight / portion.plan.counts.text_bytes for portion in portions]
    for (corpus, _, plan), own in zip(portions, wanted, strict=True):
        texts = (text.text for text in _texts(corpus, plan) if text.side == 0)
        yield from _thinned(texts, own / max(wanted) if max(wanted) else 1.0)


def _thinned(texts: Iterator[str], fraction: float) -> Iterator[str]:
    """A fraction of the texts, evenly spread: of many short ones some, of long ones the beginning."""
    seen = taken = 0
    for text in texts:
        seen += len(text)
        wanted = math.ceil(fraction * seen) - taken
        if wanted > 0:
            kept = text[:wanted] if len(text) > LONG_CHARACTERS else text
            taken += len(kept)
            yield kept


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


def _write_tokens(portions: Sequence[Portion], tokenizer: Tokenizer, folder: Path) -> list[dict[str, Any]]:
    """Write the tokens of all corpora, one after the other; what is counted of each."""
    dtype = token_dtype(tokenizer.vocab_size)
    with TokenWriter(folder / "train.bin", dtype) as train, TokenWriter(folder / "val.bin", dtype) as val:
        return [_write_corpus(corpus, plan, tokenizer, (train, val)) for corpus, _, plan in portions]


def _write_corpus(
    corpus: Corpus, plan: PreparePlan, tokenizer: Tokenizer, writers: tuple[TokenWriter, TokenWriter]
) -> dict[str, Any]:
    text_bytes, before = [0, 0], [writer.tokens for writer in writers]
    end = np.array([tokenizer.end_of_text], dtype=np.uint32)
    for batch in _counted_batches(corpus, plan):
        for part, ids in zip(batch, _encode(tokenizer, batch), strict=True):
            writers[part.side].append(ids)
            text_bytes[part.side] += len(part.text.encode())
            if part.ends:
                writers[part.side].append(end)
    in_val = int(plan.in_val.sum()) if plan.cut_at < 0 else 1
    if sum(text_bytes) != plan.counts.text_bytes:
        raise DataError("the text is not the one of a moment ago: the data changed. Try again.")
    tokens = [writer.tokens - count for writer, count in zip(writers, before, strict=True)]
    return {
        "documents": {"train": max(1, plan.documents - in_val), "val": in_val},
        "tokens": dict(zip(SIDES, tokens, strict=True)),
        "text_bytes": dict(zip(SIDES, text_bytes, strict=True)),
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
