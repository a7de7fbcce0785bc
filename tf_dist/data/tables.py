"""Rows of .csv .tsv .jsonl and .parquet as texts, a chunk of rows at a time.

A table is read unchanged or refused with row and line: nothing is guessed, padded, shifted or renamed.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tf_dist.data.columns import Column, is_null, label, no_column, only_column, without_surrogates
from tf_dist.data.decoding import LINE_CHARACTERS, Counts, decoded, lines, opened
from tf_dist.data.parquet import parquet_rows
from tf_dist.errors import DataError

# Rows of a Parquet table in memory; JSON lines among which a column must show up.
ROWS_PER_CHUNK = 1024
SEPARATORS = {".csv": ",", ".tsv": "\t"}


class TableRow(NamedTuple):
    """A row of a table: where it is, for error messages, and the cells of the requested columns, in order."""

    where: str
    cells: tuple[Any, ...]


def texts(path: Path, kind: str, column: str, errors: str, counts: Counts) -> Iterator[tuple[str, str]]:
    """The texts of one column, in file order, each with its location; cells without a value are skipped.

    Args:
        path: the table, possibly compressed.
        kind: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.
        column: which column holds the text.
        errors: ``strict`` or ``replace``, for invalid UTF-8.
        counts: its ``nulls`` and ``replaced`` are updated.

    Raises:
        DataError: as `rows`.
    """
    for where, (text,) in rows(path, kind, [Column(column)], errors, counts):
        if text is None:
            counts.nulls += 1
        else:
            yield where, text


def rows(
    path: Path, kind: str, columns: Sequence[Column], errors: str, counts: Counts
) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """The rows of a table in file order: where each is, and its cells in the order of ``columns``.

    Args:
        path: the table, possibly compressed.
        kind: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.
        columns: which ones are read.
        errors: ``strict`` or ``replace``, for invalid UTF-8.
        counts: its ``replaced`` is updated.

    Yields:
        Location and cells; None for a cell without a value.

    Raises:
        DataError: no such column or two of that name, not a table, rows of another length than the header,
            a cell that is not text, invalid UTF-8.
    """
    if kind == ".parquet":
        with opened(path) as raw:
            yield from parquet_rows(raw, path, columns, errors, counts, ROWS_PER_CHUNK)
        return
    for where, cells in _text_table(path, kind, columns, errors, counts):
        yield (
            where,
            tuple(
                None if is_null(cell) else _text(cell, where, column, errors, counts)
                for column, cell in zip(columns, cells, strict=True)
            ),
        )


def _text(cell: Any, where: str, column: Column, errors: str, counts: Counts) -> str:
    if column.labels and isinstance(cell, bool | int | float) and math.isfinite(cell):
        return label(cell)
    if not isinstance(cell, str):
        kind = type(cell).__name__
        wanted = "neither text nor a number" if column.labels else "not text"
        raise DataError(f"{where}: column {column.name!r} holds {kind}, {wanted}. Use {column.option} NAME.")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        # JSON can spell an unpaired surrogate, which no UTF-8 file can hold.
        if errors == "strict":
            raise DataError(f"{where}: a lone surrogate. Mend it, or use --errors replace.") from error
        return without_surrogates(cell, counts)
    return cell


def _text_table(
    path: Path, kind: str, columns: Sequence[Column], errors: str, counts: Counts
) -> Iterator[TableRow]:
    with opened(path) as raw:
        text = lines(decoded(raw, str(path), errors, counts), str(path))
        yield from (_json_lines(text, path, columns) if kind == ".jsonl" else _csv(text, path, kind, columns))


def place_of(number: int, path: Path, line: int) -> str:
    """Where a row is, for error messages: its number and its first line, both from 1."""
    return f"row {number} of {path} (line {line})"


def _csv(text: Iterator[str], path: Path, kind: str, columns: Sequence[Column]) -> Iterator[TableRow]:
    """Rows by Python's strict reader: pandas' splits at carriage returns, and repairs quotes and lengths."""
    csv.field_size_limit(LINE_CHARACTERS)
    reader = csv.reader(text, delimiter=SEPARATORS[kind], strict=True)
    header: list[str] = []
    places: list[int] = []
    number, line = 0, 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"row {number + 1}" if header else "the header"
            raise DataError(f"{where} of the table {path} (line {line}): {_csv_reason(error)}") from error
        if not header:
            header, places = cells, [only_column(cells, column, path) for column in columns if cells]
        elif cells or len(header) == 1:  # an empty line is no row, except in a table of one column
            number += 1
            _check_length(cells or [""], header, f"row {number} of the table {path} (line {line})")
            # Only an empty cell is null: the words "None", "NA" and "null" are text.
            found = tuple((cells[place] if cells else "") or None for place in places)
            yield TableRow(place_of(number, path, line), found)
        line = reader.line_num + 1


def _check_length(cells: Sequence[str], header: Sequence[str], where: str) -> None:
    if len(cells) == len(header):
        return
    what = "more" if len(cells) > len(header) else "fewer"
    raise DataError(
        f"{where} has {what} cells than columns: {len(cells)}, and {len(header)} are named in the header. "
        "Quote cells that hold the separator or a line feed, and write empty cells too."
    )


def _csv_reason(error: csv.Error) -> str:
    """Message about an error of `csv`, for the user who has to repair the row."""
    said = str(error)
    if "expected after" in said:
        return (
            'a quoted cell goes on behind its closing quote. A quote inside quotes is written twice (""), '
            "not with a backslash; quote a whole cell or none of it."
        )
    if "new-line character" in said:
        return "a carriage return alone, outside quotes. Quote that cell, or end rows by line feeds."
    if "unexpected end" in said:
        return "its last quoted cell is never closed. Close it, or double the quotes inside."
    if "field limit" in said:
        return f"a cell has more than {LINE_CHARACTERS:,} characters: a quote is not closed."
    return f"{said}. Mend that row."


def _json_lines(text: Iterator[str], path: Path, columns: Sequence[Column]) -> Iterator[TableRow]:
    """Rows by Python's own reader: pandas' would convert texts that look like dates and numbers."""
    others: dict[str, None] = {}
    missing, number = list(columns), 0
    for line, spelled in enumerate(text, start=1):
        if not spelled.strip():
            continue
        record = _record(spelled, columns, f"line {line} of {path}")
        number += 1
        if missing:
            missing = [column for column in missing if column.name not in record]
            others.update(dict.fromkeys(record))
            _check_seen(missing, number, path, others)
        cells = tuple(record.get(column.name) for column in columns)
        yield TableRow(place_of(number, path, line), cells)
    if number and missing:
        raise no_column(path, missing[0], list(others))


def _check_seen(missing: Sequence[Column], rows_read: int, path: Path, others: Mapping[str, None]) -> None:
    """Refuse a table in which a column has not shown up, if it should have by now."""
    for column in missing:
        if column.required or rows_read >= ROWS_PER_CHUNK:
            raise no_column(path, column, list(others))


def _record(line: str, columns: Sequence[Column], where: str) -> dict[str, Any]:
    twice: set[str] = set()

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # The object of the line itself is the last one to be closed.
        twice.clear()
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            twice.update(name for name in made if names.count(name) > 1)
        return made

    try:
        record = json.loads(line, object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}. Mend that line of the table.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is JSON, but no object with columns. Mend that line of the table.")
    for column in columns:
        if column.name in twice:
            raise DataError(f"{where} has the key {column.name!r} twice. Keep one of them.")
    return record
