"""Records of a task: rows of tables with several named columns, of gettext catalogues, and of parallel text.

What a column is for is its *role* (``source``, ``target``, ``label``, ``context``, ``question``, ``answer``);
what it is called in the files is its name. Every record is complete: a cell without a value is an error that
names its row, unless its role is optional.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tf_dist.corpora.gettext_catalogues import messages
from tf_dist.data.columns import Column, no_column
from tf_dist.data.decoding import COMPRESSIONS, Counts, decoded, lines, opened
from tf_dist.data.sources import STDLIB, TABLE_SUFFIXES, find_files, kind_of
from tf_dist.data.tables import place_of, rows
from tf_dist.errors import DataError, UsageError

TABLES = (*TABLE_SUFFIXES, ".parquet")
CATALOGUE = ".po"
CATALOGUE_COLUMNS = ("msgid", "msgstr", "msgctxt")
# Of roles in which a number or a boolean is as good as text: its JSON spelling.
NUMERIC_ROLES = ("label", "start")
Cells = tuple[str, tuple[str | None, ...]]


class Record(NamedTuple):
    """One example.

    ``where`` it is, for error messages; the ``folder`` that relative names of files in its cells start from;
    its ``values`` by role.
    """

    where: str
    folder: Path
    values: Mapping[str, str]


@dataclass
class RecordCounts(Counts):
    """Statistics of one pass.

    ``documents`` is the number of records, ``nulls`` that of empty optional cells, ``empty`` that of lines
    that are empty in all files of a parallel text.

    skipped: entries of catalogues that were left out, by reason: untranslated, fuzzy, obsolete.
    """

    skipped: Counter[str] = field(default_factory=Counter)


class Records:
    """The records of some files.

    Args:
        sources: files, globs and folders; `tf_dist.data.sources.find_files` has the rules. Tables are .csv
            .tsv .jsonl .parquet; gettext .po has the columns msgid, msgstr and msgctxt; of a parallel text,
            each file holds one column, which is its suffix (``train.de`` and ``train.en``), one row per line.
        columns: role -> name of the column.
        optional: roles that may be empty.
        errors: ``strict`` or ``replace``, for invalid UTF-8.

    Attributes:
        files: the files, in order.
        suffixes: of the kinds of files that are read.
        passed_over: number of skipped files in folders and globs, by unsupported suffix.

    Raises:
        DataError: a source is missing, unreadable or of an unknown kind; a file of a parallel text is
            missing.
        UsageError: no column, or ``errors`` is invalid.
    """

    def __init__(
        self,
        sources: Sequence[str],
        columns: Mapping[str, str],
        *,
        optional: Sequence[str] = (),
        errors: str = "strict",
    ) -> None:
        if errors not in ("strict", "replace"):
            raise UsageError(f"errors is {errors!r}: it must be strict or replace.")
        if not columns:
            raise UsageError("no column is named: which ones hold the source and the target?")
        if STDLIB in sources:
            raise DataError(f"{STDLIB} is text without columns. Name a table, or stdlib-docstrings.")
        self.roles = tuple(columns)
        self.columns = [
            Column(name, f"--{role}-column", role in NUMERIC_ROLES, role not in optional)
            for role, name in columns.items()
        ]
        self.errors = errors
        parallel = {f".{name.lower()}" for name in columns.values()}
        self.suffixes = (*TABLES, CATALOGUE, *sorted(parallel - {*TABLES, CATALOGUE, *COMPRESSIONS}))
        self.passed_over: Counter[str] = Counter()
        self.files = find_files(sources, self.passed_over, self.suffixes)
        self._parallel = self._grouped()

    def read(self, counts: RecordCounts | None = None) -> Iterator[Record]:
        """Every record, in the order of the files; may be called again.

        Args:
            counts: new; filled during the pass.

        Raises:
            DataError: with file and row: a cell that is empty or no text, a file that cannot be read,
                parallel files of unequal length, a named file without rows, no record at all.
        """
        counts = RecordCounts() if counts is None else counts
        for file in self.files:
            before = counts.documents
            for where, cells in self._rows(file.path, counts):
                values = {
                    role: self._value(cell, column, where, counts)
                    for role, column, cell in zip(self.roles, self.columns, cells, strict=True)
                }
                counts.documents += 1
                counts.text_bytes += sum(len(value.encode()) for value in values.values())
                yield Record(where, file.path.parent, values)
            in_a_group = file.path in self._parallel and self._parallel[file.path][0] != file.path
            if file.named and not in_a_group and counts.documents == before:
                raise DataError(f"{file.path} has no rows. Leave it out, or check how it was written.")
        if not counts.documents:
            raise DataError(f"no rows in {' '.join(str(file.path) for file in self.files)}.")

    def _value(self, cell: str | None, column: Column, where: str, counts: Counts) -> str:
        if cell is not None and cell.strip():
            return cell
        if column.required:
            raise DataError(
                f"{where}: column {column.name!r} is empty. Fill it in, remove the row, or use "
                f"{column.option} NAME."
            )
        counts.nulls += 1
        return cell or ""

    def _rows(self, path: Path, counts: RecordCounts) -> Iterator[Cells]:
        if path in self._parallel:
            # All files of a parallel text are read where the first one is in the list.
            if self._parallel[path][0] == path:
                yield from self._parallel_rows(path, counts)
        elif kind_of(path, self.suffixes) == CATALOGUE:
            yield from self._catalogue_rows(path, counts)
        else:
            kind = kind_of(path, self.suffixes)
            yield from rows(path, kind, self.columns, self.errors, counts)

    def _catalogue_rows(self, path: Path, counts: RecordCounts) -> Iterator[Cells]:
        for column in self.columns:
            if column.name not in CATALOGUE_COLUMNS:
                raise no_column(path, column, CATALOGUE_COLUMNS)
        with opened(path) as raw:
            text = "".join(decoded(raw, str(path), self.errors, counts))
        for number, message in enumerate(messages(text, str(path), counts.skipped), start=1):
            cells = {"msgid": message.msgid, "msgstr": message.msgstr, "msgctxt": message.context or None}
            yield place_of(number, path, message.line), tuple(cells[column.name] for column in self.columns)

    def _grouped(self) -> dict[Path, list[Path]]:
        """Each file of a parallel text -> the files of its text, in the order of the list."""
        named = [file.path for file in self.files]
        texts: dict[tuple[Path, str], list[Path]] = {}
        for path in named:
            kind = kind_of(path, self.suffixes)
            if kind not in (*TABLES, CATALOGUE):
                texts.setdefault((path.parent, _stem(path, kind)), []).append(path)
        for (folder, stem), paths in texts.items():
            kinds = Counter(kind_of(path, self.suffixes) for path in paths)
            for column in self.columns:
                _check_part(column, kinds[f".{column.name.lower()}"], folder / stem, paths)
        return {path: paths for paths in texts.values() for path in paths}

    def _parallel_rows(self, path: Path, counts: RecordCounts) -> Iterator[Cells]:
        by_kind = {kind_of(one, self.suffixes): one for one in self._parallel[path]}
        paths = [by_kind[f".{column.name.lower()}"] for column in self.columns]
        with ExitStack() as stack:
            texts = [
                lines(decoded(stack.enter_context(opened(one)), str(one), self.errors, counts), str(one))
                for one in paths
            ]
            for number, found in enumerate(itertools.zip_longest(*texts), start=1):
                if None in found:
                    raise _unequal(paths, found, texts, number)
                cells = tuple(line.rstrip("\r\n") for line in found)
                if not any(cell.strip() for cell in cells):
                    counts.empty += 1
                else:
                    yield f"line {number} of {' and '.join(map(str, paths))}", cells


def read_records(
    sources: Sequence[str],
    columns: Mapping[str, str],
    *,
    optional: Sequence[str] = (),
    errors: str = "strict",
    counts: RecordCounts | None = None,
) -> Iterator[Record]:
    """The records of some files, once; see `Records`.

    Args:
        sources: files, globs and folders.
        columns: role -> name of the column.
        optional: roles that may be empty.
        errors: ``strict`` or ``replace``, for invalid UTF-8.
        counts: new; filled during the pass.

    Raises:
        DataError, UsageError: see `Records`.
    """
    return Records(sources, columns, optional=optional, errors=errors).read(counts)


def _stem(path: Path, kind: str) -> str:
    return path.name[: path.name.lower().rindex(kind)]


def _check_part(column: Column, files: int, stem: Path, paths: Sequence[Path]) -> None:
    """Refuse a parallel text that has not one file for a column."""
    listed = " ".join(path.name for path in paths)
    if not files:
        raise DataError(
            f"{stem}.{column.name} is missing beside {listed}: of a parallel text, every column is a file. "
            f"Name it, too, or use {column.option} SUFFIX."
        )
    if files > 1:
        raise DataError(
            f"column {column.name!r} is in two files of {stem.parent}: {listed}. Name one of them."
        )


def _unequal(
    paths: Sequence[Path], found: Sequence[str | None], texts: Sequence[Iterator[str]], number: int
) -> DataError:
    """The error for parallel files, of which some end before line ``number``."""
    totals = [
        number - 1 if line is None else number + sum(1 for _ in text)
        for line, text in zip(found, texts, strict=True)
    ]
    lengths = ", ".join(f"{path} has {total:,} lines" for path, total in zip(paths, totals, strict=True))
    short = paths[found.index(None)]
    return DataError(
        f"unequal parallel files: {lengths}. The first missing one is line {number:,} of {short}."
    )
