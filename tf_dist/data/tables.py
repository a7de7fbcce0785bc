"""Rows of .csv .tsv .jsonl and .parquet as texts, a chunk of rows at a time.

A table is read unchanged or refused with row and line: nothing is guessed, padded, shifted or renamed.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tf_dist.data.columns import no_column, only_column, without_surrogates
from tf_dist.data.decoding import LINE_CHARACTERS, Counts, decoded, lines, opened
from tf_dist.data.parquet import parquet_cells
from tf_dist.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

ROWS_PER_CHUNK = 1024
SEPARATORS = {".csv": ",", ".tsv": "\t"}


class TableRow(NamedTuple):
    """A row of a table: its number and its first line, both from 1, and the requested cell."""

    number: int
    line: int
    cell: Any


def rows(path: Path, kind: str, column: str, errors: str, counts: Counts) -> Iterator[tuple[str, str]]:
    """The texts of one column, in file order, each with its location for error messages.

    Args:
        path: the table, possibly compressed.
        kind: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.
        column: which column holds the text.
        errors: ``strict`` or ``replace``, for invalid UTF-8.
        counts: its ``nulls`` and ``replaced`` are updated.

    Raises:
        DataError: no such column or two of that name, not a table, rows of another length than the header,
            a cell that is not text, invalid UTF-8.
    """
    if kind == ".parquet":
        with opened(path) as raw:
            for cells in parquet_cells(raw, path, column, errors, counts, ROWS_PER_CHUNK):
                yield from _present(cells, counts)
        return
    for cells in _text_table(path, kind, column, errors, counts):
        for where, cell in _present(cells, counts):
            yield where, _text(cell, where, column, errors, counts)


def _present(cells: pd.Series[Any], counts: Counts) -> Iterator[tuple[str, Any]]:
    """Cells with a value, and their locations; nulls are counted."""
    missing = cells.isna()
    counts.nulls += int(missing.sum())
    yield from ((str(where), cell) for where, cell in cells[~missing].items())


def _text(cell: Any, where: str, column: str, errors: str, counts: Counts) -> str:
    if not isinstance(cell, str):
        kind = type(cell).__name__
        raise DataError(f"{where}: column {column!r} holds {kind}, not text. Use --text-column NAME.")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        # JSON can spell an unpaired surrogate, which no UTF-8 file can hold.
        if errors == "strict":
            raise DataError(f"{where}: a lone surrogate. Mend it, or use --errors replace.") from error
        return without_surrogates(cell, counts)
    return cell


def _text_table(path: Path, kind: str, column: str, errors: str, counts: Counts) -> Iterator[pd.Series[Any]]:
    import pandas as pd

    with opened(path) as raw:
        text = lines(decoded(raw, str(path), errors, counts), str(path))
        found = _json_lines(text, path, column) if kind == ".jsonl" else _csv(text, path, kind, column)
        while chunk := list(itertools.islice(found, ROWS_PER_CHUNK)):
            places = [f"row {row.number} of {path} (line {row.line})" for row in chunk]
            yield pd.Series([row.cell for row in chunk], places, dtype=object)


def _csv(text: Iterator[str], path: Path, kind: str, column: str) -> Iterator[TableRow]:
    """Rows by Python's strict reader: pandas' splits at carriage returns, and repairs quotes and lengths."""
    csv.field_size_limit(LINE_CHARACTERS)
    reader = csv.reader(text, delimiter=SEPARATORS[kind], strict=True)
    header: list[str] = []
    place, number, line = 0, 0, 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"row {number + 1}" if header else "the header"
            raise DataError(f"{where} of the table {path} (line {line}): {_csv_reason(error)}") from error
        if not header:
            header, place = cells, only_column(cells, column, path) if cells else 0
        elif cells or len(header) == 1:  # an empty line is no row, except in a table of one column
            number += 1
            _check_length(cells or [""], header, f"row {number} of the table {path} (line {line})")
            # Only an empty cell is null: the words "None", "NA" and "null" are text.
            yield TableRow(number, line, (cells[place] if cells else "") or None)
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


def _json_lines(text: Iterator[str], path: Path, column: str) -> Iterator[TableRow]:
    """Rows by Python's own reader: pandas' would convert texts that look like dates and numbers."""
    others: dict[str, None] = {}
    seen, number = False, 0
    for line, spelled in enumerate(text, start=1):
        if not spelled.strip():
            continue
        record = _record(spelled, column, f"line {line} of {path}")
        number += 1
        if not seen:
            seen = column in record
            others.update(dict.fromkeys(record))
            if not seen and number >= ROWS_PER_CHUNK:
                raise no_column(path, column, list(others))
        yield TableRow(number, line, record.get(column))
    if number and not seen:
        raise no_column(path, column, list(others))


def _record(line: str, column: str, where: str) -> dict[str, Any]:
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
    if column in twice:
        raise DataError(f"{where} has the key {column!r} twice. Keep one of them.")
    return record
