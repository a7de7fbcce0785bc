"""Records of a task -> rows on disk, prepared once and reused, as `tf_dist.data.prepare` does with text."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tf_dist import progress
from tf_dist.atomic_io import read_capped, sha256_of, sync_folder, temporary_name, write_whole
from tf_dist.config import Config
from tf_dist.data.prepare import KINDS, left_out, name_of
from tf_dist.data.prepared_dataset import (
    EXAMPLES,
    FORMATS,
    HELD_OUT,
    META_LIMIT_BYTES,
    SIDES,
    Prepared,
    open_prepared,
    publish,
)
from tf_dist.data.records import Record, RecordCounts, Records
from tf_dist.data.sources import files_sha256, fingerprint
from tf_dist.data.split import check_fraction, content_keys, split_rows, stratified_split
from tf_dist.data.tokenizer import (
    Tokenizer,
    UnknownCharacter,
    check_vocab_size,
    load_tokenizer,
    train_tokenizer,
)
from tf_dist.data.tokens import TokenWriter, content_sha256, map_tokens, sample_sha256
from tf_dist.errors import DataError
from tf_dist.tasks.base import EncodedRows, Task
from tf_dist.untrusted_files import parsed_json

LOG = logging.getLogger(__name__)
# Rows that are encoded together.
BATCH_ROWS = 4096
HELD_OUT_LIMIT_BYTES = 1 << 30
# Characters of a label: what is longer is text of another column.
LONGEST_LABEL = 1000
# Options of a run that determine its rows, besides the files.
OPTIONS = (
    "task", "architecture", "text_column", "source_column", "target_column", "label_column", "source_len",
    "target_len", "seq_len", "tokenizer", "vocab_size", "val_fraction", "seed", "errors", "context_column",
    "question_column", "answer_column", "start_column", "sample_rate", "mels", "stack_frames", "image_size",
    "patch_size",
)  # fmt: skip


class Split(NamedTuple):
    """The records of each side, and the labels of training."""

    train: list[Record]
    val: list[Record]
    labels: list[str]

    def of(self, side: str) -> list[Record]:
        """One side's records."""
        return self.train if side == "train" else self.val


def prepare_examples(
    task: Task, config: Config, sources: Sequence[str], labels: Sequence[str] | None = None
) -> Prepared:
    """The rows of a task, prepared or found.

    Args:
        task: of tables.
        config: of the run.
        sources: files, globs and folders.
        labels: of a trained run, whose model all rows are to be judged by: all are held out. None: some are.

    Raises:
        DataError: a table that cannot be read, with file and row; labels; or nothing can be written.
        UsageError: an invalid option.
    """
    check_fraction(config.val_fraction)
    records = Records(sources, task.columns(), errors=config.errors)
    key = _key(task, config, fingerprint(records.files), labels)
    target = Path(config.prepared_dir) / f"{name_of(sources[0])}-{key[:12]}"
    if target.exists():
        try:
            return open_prepared(target)
        except DataError as error:
            LOG.warning(f"preparing again: {error}")
    temporary = temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        _write(task, config, list(sources), records, key, temporary, labels)
        sync_folder(temporary)
        return publish(temporary, target)
    except OSError as error:
        raise DataError(
            f"cannot write prepared rows to {target.parent}: {error.strerror or error}. Choose another "
            "--prepared-dir."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def held_out(corpus: Prepared) -> list[dict[str, str]]:
    """The cells of the held-out rows, by role, in the order of the rows.

    Raises:
        DataError: the file is missing, or damaged.
    """
    path = corpus.path / HELD_OUT
    data = read_capped(path, HELD_OUT_LIMIT_BYTES)
    try:
        # Not `str.splitlines`, which ends a line at U+2028 too; JSON writes a line feed as two characters.
        found = [parsed_json(line) for line in data.decode("utf-8", "surrogatepass").split("\n")[:-1]]
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Delete its folder and prepare again.") from error
    if len(found) != corpus.meta["rows"]["val"] or not all(map(_is_row, found)):
        raise DataError(f"{path} is damaged: not the cells of each row. Delete its folder and prepare again.")
    return found


def _is_row(cells: object) -> bool:
    return isinstance(cells, dict) and all(isinstance(cell, str) for cell in cells.values())


def _key(task: Task, config: Config, files: list[list[str | int]], labels: Sequence[str] | None) -> str:
    options = {name: getattr(config, name) for name in OPTIONS}
    if config.tokenizer not in KINDS:
        options["tokenizer"] = _tokenizer_sha256(config.tokenizer)
    if ":" in config.task:  # rows are what a user's code makes of them
        options["code"] = _code_sha256(type(task))
    parts: dict[str, Any] = {"format": EXAMPLES, "version": FORMATS[EXAMPLES][0], "options": options}
    parts |= {"files": files} if labels is None else {"files": files, "labels": list(labels)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _code_sha256(users: type[Task]) -> str:
    """The SHA-256 of the file that defines a user's class; empty if it has none, as in a console."""
    try:
        return sha256_of(Path(inspect.getfile(users)))
    except (OSError, TypeError):
        return ""


def _tokenizer_sha256(path: str) -> str:
    try:
        return sha256_of(Path(path))
    except OSError as error:
        raise DataError(
            f"cannot read tokenizer {path}: {error.strerror}. It is none of {' '.join(KINDS)}"
        ) from error


def _write(
    task: Task,
    config: Config,
    sources: list[str],
    records: Records,
    key: str,
    folder: Path,
    labels: Sequence[str] | None,
) -> None:
    counts = RecordCounts()
    with progress.task("reading the rows"):
        everything = list(records.read(counts))
    others = {f"{reason} entries of catalogues": count for reason, count in counts.skipped.items()}
    others["lines that are empty in all files"] = counts.empty
    for line in left_out(records.passed_over, others, counts.replaced):
        LOG.info(line)
    if labels is None:
        split = split_records(task, config, everything)
    else:
        split = Split([], everything, list(labels))
    tokenizer = _tokenizer(task, config, split)
    tokenizer.save(folder / "tokenizer.json")
    cut, targets = Counter[str](), dict[str, int]()
    for side in SIDES:
        targets[side], lost = _write_side(task, split, side, tokenizer, folder)
        cut.update(lost)
    _say_what_was_cut(cut, config)
    lines = "".join(json.dumps(dict(record.values), ensure_ascii=False) + "\n" for record in split.val)
    write_whole(folder / HELD_OUT, lines.encode("utf-8", "surrogatepass"))
    _write_meta(task, config, sources, records, key, folder, counts, split, tokenizer, cut, targets)


def split_records(task: Task, config: Config, records: Sequence[Record]) -> Split:
    """Both sides of the split of some records, by their content: what a run trains on, and what it holds out.

    Args:
        task: of the run; one with labels is split by label.
        config: of the run: fraction and seed.
        records: all of them, in the order of the files.

    Raises:
        UsageError: an invalid fraction.
    """
    keys = content_keys([record.values[role] for role in task.roles] for record in records)
    labels = [task.label(record) for record in records]
    for record, label in zip(records, labels, strict=True):
        if len(label) > LONGEST_LABEL:
            raise DataError(
                f"{record.where}: a label of {len(label):,} characters ({label[:20]!r}...) is a text, and no "
                "class. Name the column with the labels by --label-column NAME"
            )
    if any(labels):
        in_val = stratified_split(labels, config.val_fraction, config.seed, keys)
    else:
        in_val = split_rows(keys, config.val_fraction, config.seed)
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record, held_out in zip(records, in_val, strict=True):
        sides[int(held_out)].append(record)
    if config.val_fraction and not sides[1]:
        LOG.warning(
            "no row is held out: no label has two different rows. There will be no validation"
            if any(labels)
            else "no row is held out: all rows are equal. There will be no validation"
        )
    known = sorted({task.label(record) for record in sides[0]} - {""})
    if len(known) == 1:
        LOG.warning(f"all rows have the label {known[0]!r}: there is nothing to learn")
    said = f", {len(known):,} label{'s' * (len(known) != 1)}" if known else ""
    LOG.info(f"{len(sides[0]):,} rows to train on, {len(sides[1]):,} held out{said}")
    return Split(*sides, known)


def _tokenizer(task: Task, config: Config, split: Split) -> Tokenizer:
    if config.tokenizer not in KINDS:
        tokenizer = load_tokenizer(config.tokenizer)
        check_vocab_size(config.tokenizer, config.vocab_size, tokenizer.vocab_size)
        return tokenizer
    # A character that only validation has would have no id.
    records = split.train + (split.val if config.tokenizer == "char" else [])
    texts = (text for record in records for text in task.texts(record))
    with progress.task("training the tokenizer"):
        tokenizer = train_tokenizer(config.tokenizer, texts, config.vocab_size)
    LOG.info(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    return tokenizer


def _write_side(
    task: Task, split: Split, side: str, tokenizer: Tokenizer, folder: Path
) -> tuple[int, Counter[str]]:
    """Write the rows of a side; the number of its targets, and of the tokens that were cut off."""
    records, targets, cut = split.of(side), 0, Counter[str]()
    with (
        progress.task(f"encoding rows ({side})", len(records), "rows") as task_shown,
        TokenWriter(folder / f"{side}.bin", "int32") as file,
    ):
        for start in range(0, len(records), BATCH_ROWS):
            rows = _encoded(task, records[start : start + BATCH_ROWS], tokenizer, split.labels)
            file.append(_words(rows).reshape(-1))
            targets += int(np.count_nonzero(rows.y_NxU != -1))
            cut.update(rows.cut)
            task_shown.advance(len(rows.x_NxW))
    return targets, cut


def _encoded(
    task: Task, records: Sequence[Record], tokenizer: Tokenizer, labels: Sequence[str]
) -> EncodedRows:
    try:
        return task.encode(records, tokenizer, labels)
    except UnknownCharacter as error:
        # A tokenizer encodes many texts at once, and knows no rows: one at a time finds it again.
        for record in records:
            try:
                task.encode([record], tokenizer, labels)
            except UnknownCharacter as own:
                raise DataError(f"{record.where}: {own}") from error
        raise


def _words(rows: EncodedRows) -> npt.NDArray[np.int32]:
    return np.concatenate([rows.x_NxW, rows.y_NxU], axis=1)


def _say_what_was_cut(cut: Counter[str], config: Config) -> None:
    for side, tokens in cut.items():
        if tokens:
            slots = getattr(config, f"{side}_len") or config.seq_len
            LOG.warning(
                f"{tokens:,} tokens of {side}s were cut off: rows have {slots} slots for them. Raise "
                f"--{side}-len or --seq-len to keep them"
            )


def _write_meta(
    task: Task,
    config: Config,
    sources: list[str],
    records: Records,
    key: str,
    folder: Path,
    counts: RecordCounts,
    split: Split,
    tokenizer: Tokenizer,
    cut: Counter[str],
    targets: dict[str, int],
) -> None:
    # One row, to know its shape; there is one, as tables without rows are refused.
    row = task.encode((split.train or split.val)[:1], tokenizer, split.labels)
    rows = {side: len(split.of(side)) for side in SIDES}
    meta: dict[str, Any] = {
        "format": EXAMPLES,
        "version": FORMATS[EXAMPLES][0],
        "key": key,
        "sources": sources,
        "files": len(records.files),
        "documents": rows,
        "rows": rows,
        "tokens": {side: rows[side] * (row.x_NxW.shape[1] + row.y_NxU.shape[1]) for side in SIDES},
        "text_bytes": {"train": counts.text_bytes, "val": 0},
        "split": "document" if rows["val"] else "none",
        "seed": config.seed,
        "val_fraction": config.val_fraction,
        "dtype": "int32",
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_sha256": sha256_of(folder / "tokenizer.json"),
        "content_sha256": content_sha256(folder / "train.bin", folder / "val.bin"),
        "sample_sha256": {side: sample_sha256(map_tokens(folder / f"{side}.bin", "int32")) for side in SIDES},
        "files_sha256": files_sha256(records.files),
        "replaced": counts.replaced,
        "skipped": {name: getattr(counts, name) for name in ("nulls", "empty", "not_utf8", "duplicates")},
        "task": config.task,
        "words": row.x_NxW.shape[1],
        "targets": row.y_NxU.shape[1],
        "counted": targets,
        "cut": {side: cut[side] for side in ("source", "target")},
        "labels": split.labels,
        "suffixes": list(records.suffixes),
        "held_out_sha256": sha256_of(folder / HELD_OUT),
    }
    spelled = json.dumps(meta, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if len(spelled) > META_LIMIT_BYTES:
        raise DataError(
            f"{len(split.labels):,} labels are too many: their names take more than {META_LIMIT_BYTES:,} "
            "bytes. Name the column with the labels by --label-column NAME"
        )
    write_whole(folder / "meta.json", spelled)
