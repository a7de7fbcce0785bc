"""Rows of a Parquet table, with UTF-8 validation, which Arrow skips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tf_dist.data.columns import Column, is_null, label, only_column
from tf_dist.data.decoding import REPLACEMENT, Counts
from tf_dist.errors import DataError

TEXTS = "string large_string string_view binary large_binary binary_view fixed_size_binary".split()
LABELS = "boolean integer floating".split()


def parquet_rows(
    raw: BinaryIO, path: Path, columns: Sequence[Column], errors: str, counts: Counts, rows_per_chunk: int
) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """Rows of columns of strings or bytes, and of numbers where they are labels; None for null.

    Args:
        raw: the open file.
        path: its name.
        columns: which ones are read.
        errors: ``strict`` or ``replace``, for invalid UTF-8.
        counts: its ``replaced`` is updated.
        rows_per_chunk: maximum number of rows in memory.

    Raises:
        DataError: pyarrow is missing, the table is damaged, no such column or two of that name, a column of
            another type, invalid UTF-8.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'tf_dist[parquet]'") from error

    number = 0
    try:
        table = pq.ParquetFile(raw)
        for column in columns:
            place = only_column(list(table.schema_arrow.names), column, path)
            _check_type(table.schema_arrow.types[place], column, path)
        names = list(dict.fromkeys(column.name for column in columns))
        for batch in table.iter_batches(batch_size=rows_per_chunk, columns=names):
            read = [_as_cells(batch.column(column.name)) for column in columns]
            for cells in zip(*read, strict=True):
                number += 1
                where = f"row {number} of {path}"
                yield where, tuple(_text(cell, where, errors, counts) for cell in cells)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a sound .parquet table: {reason}. Get a whole copy.") from error


def _check_type(kind: Any, column: Column, path: Path) -> None:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    accepted = TEXTS + LABELS if column.labels else TEXTS
    if types.is_null(kind) or any(getattr(types, f"is_{name}", lambda _: False)(kind) for name in accepted):
        return
    wanted = "neither text nor numbers" if column.labels else "not text"
    raise DataError(f"{path}: column {column.name!r} holds {kind}, {wanted}. Use {column.option} NAME.")


def _as_cells(column: Any) -> list[Any]:
    """Bytes of text, Python's own numbers and booleans, and None."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if any(getattr(pa.types, f"is_{name}")(column.type) for name in LABELS):
        return list(column.to_pylist())
    return list(column.cast(pa.large_binary()).to_pylist())


def _text(cell: Any, where: str, errors: str, counts: Counts) -> str | None:
    if is_null(cell):
        return None
    return _decoded(cell, where, errors, counts) if isinstance(cell, bytes) else label(cell)


def _decoded(cell: bytes, where: str, errors: str, counts: Counts) -> str:
    try:
        return cell.decode()
    except UnicodeDecodeError as error:
        if errors == "strict":
            raise DataError(
                f"{where} is not UTF-8: byte 0x{cell[error.start]:02x} at offset {error.start} of the cell "
                f"({error.reason}). Convert it, or use --errors replace."
            ) from error
    text = cell.decode("utf-8", "replace")
    counts.replaced += text.count(REPLACEMENT) - cell.count(REPLACEMENT.encode())
    return text
