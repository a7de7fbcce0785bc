"""Rows of .csv .tsv .jsonl and .parquet as texts, a chunk of rows at a time."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.data.decoding import REPLACEMENT, Counts, Utf8Bytes, decoded, opened
from tf_dist.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

ROWS_PER_CHUNK = 1024
# Only an empty cell is null: pandas would also take the words "None", "NA" and "null" for nothing.
CSV: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""]}


def rows(path: Path, kind: str, column: str, errors: str, counts: Counts) -> Iterator[str]:
    """The texts of one column, in file order.

    Args:
        path: the table, possibly ``.gz``.
        kind: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.
        column: which column holds the text.
        errors: ``strict`` or ``replace``, for bytes that are not UTF-8.
        counts: its ``nulls`` and ``replaced`` grow.

    Raises:
        DataError: no such column, not a table, a cell that is not text, bytes that are not UTF-8.
    """
    if kind == ".parquet":
        chunks = _parquet(path, column, errors, counts)
    else:
        chunks = _text_table(path, kind, column, errors, counts)
    first_row = 0
    for cells in chunks:
        missing = cells.isna()
        counts.nulls += int(missing.sum())
        for number, cell in cells[~missing].items():
            yield _text(cell, f"row {first_row + int(str(number)) + 1} of {path}", column, errors, counts)
        first_row += len(cells)


def _text(cell: Any, where: str, column: str, errors: str, counts: Counts) -> str:
    if not isinstance(cell, str):
        kind = type(cell).__name__
        raise DataError(f"{where}: column {column!r} holds {kind}, not text. Use --text-column NAME.")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which no UTF-8 file can hold.
        if errors == "strict":
            raise DataError(f"{where}: a lone surrogate. Mend it, or use --errors replace.") from error
        counts.replaced += sum(0xD800 <= ord(sign) < 0xE000 for sign in cell)
        return "".join(REPLACEMENT if 0xD800 <= ord(sign) < 0xE000 else sign for sign in cell)
    return cell


def _text_table(path: Path, kind: str, column: str, errors: str, counts: Counts) -> Iterator[pd.Series[Any]]:
    with opened(path) as raw:
        bytes_ = Utf8Bytes(decoded(raw, str(path), errors, counts))
        # newline="\n": cells keep their carriage returns, and JSON lines end at line feeds only.
        text = io.TextIOWrapper(io.BufferedReader(bytes_), encoding="utf-8", newline="\n")
        if kind == ".jsonl":
            yield from _json_lines(text, path, column)
        else:
            yield from _csv(text, path, "\t" if kind == ".tsv" else ",", column, bytes_)


def _csv(
    text: io.TextIOWrapper, path: Path, separator: str, column: str, source: Utf8Bytes
) -> Iterator[pd.Series[Any]]:
    import pandas as pd

    try:
        frames: Any = pd.read_csv(text, sep=separator, chunksize=ROWS_PER_CHUNK, **CSV)
        for frame in frames:
            if column not in frame.columns:
                raise no_column(path, column, [str(name) for name in frame.columns])
            if not isinstance(frame.index, pd.RangeIndex):
                # pandas takes the cells too many for names of rows, and shifts the others.
                raise DataError(
                    f"{path} has rows with more cells than columns. Quote cells that hold a comma."
                )
            yield frame[column].reset_index(drop=True)
    except pd.errors.EmptyDataError:
        return
    except pd.errors.ParserError as error:
        if source.failure:
            raise source.failure from None
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{path} is not a sound table: {reason}. Mend that row.") from error


def _json_lines(text: io.TextIOWrapper, path: Path, column: str) -> Iterator[pd.Series[Any]]:
    """Cells by Python's own reader: pandas' would make dates and numbers of texts that look like them."""
    import pandas as pd

    lines = ((number, line) for number, line in enumerate(text, start=1) if line.strip())
    seen = False
    while chunk := list(itertools.islice(lines, ROWS_PER_CHUNK)):
        records = [_record(line, f"line {number} of {path}") for number, line in chunk]
        seen = seen or any(column in record for record in records)
        if not seen:
            raise no_column(path, column, list({str(key): None for record in records for key in record}))
        yield pd.Series([record.get(column) for record in records], dtype=object)


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}. Mend that line of the table.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is JSON, but no object with columns. Mend that line of the table.")
    return record


def _parquet(path: Path, column: str, errors: str, counts: Counts) -> Iterator[pd.Series[Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'tf_dist[parquet]'") from error

    with opened(path) as raw:
        try:
            table = pq.ParquetFile(raw)
            if column not in table.schema_arrow.names:
                raise no_column(path, column, list(table.schema_arrow.names))
            for batch in table.iter_batches(batch_size=ROWS_PER_CHUNK, columns=[column]):
                yield _cells(batch.column(0), errors, counts)
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path} is not a sound .parquet table: {reason}. Get a whole copy.") from error


def _cells(column: Any, errors: str, counts: Counts) -> pd.Series[Any]:
    """An Arrow column as a pandas one. Arrow does not look whether its strings are UTF-8: we do."""
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        if errors == "strict" or not pa.types.is_string(column.type):
            raise
        texts = [
            None if raw is None else _replaced(raw, counts) for raw in column.cast(pa.binary()).to_pylist()
        ]
        column = pa.array(texts, pa.string())
    cells: pd.Series[Any] = column.to_pandas().astype(object)
    return cells


def _replaced(raw: bytes, counts: Counts) -> str:
    text = raw.decode("utf-8", "replace")
    counts.replaced += text.count(REPLACEMENT) - raw.count(REPLACEMENT.encode())
    return text


def no_column(path: Path, column: str, columns: list[str]) -> DataError:
    """The error for a table without the wanted column."""
    listed = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    return DataError(f"{path} has no column {column!r}. Columns: {listed}. Use --text-column NAME.")
