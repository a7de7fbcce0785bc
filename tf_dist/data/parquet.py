"""Cells of one column of a Parquet table, with UTF-8 validation, which Arrow skips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tf_dist.data.columns import only_column
from tf_dist.data.decoding import REPLACEMENT, Counts
from tf_dist.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def parquet_cells(
    raw: BinaryIO, path: Path, column: str, errors: str, counts: Counts, rows_per_chunk: int
) -> Iterator[pd.Series[Any]]:
    """Decoded cells of a column of strings or bytes; None for null. The index is the row number.

    Args:
        raw: the open file.
        path: its name.
        column: which column holds the text.
        errors: ``strict`` or ``replace``, for invalid UTF-8.
        counts: its ``replaced`` is updated.
        rows_per_chunk: maximum number of cells in memory.

    Raises:
        DataError: pyarrow is missing, the table is damaged, no such column or two of that name, a column of
            another type, invalid UTF-8.
    """
    try:
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'tf_dist[parquet]'") from error

    first_row = 1
    try:
        table = pq.ParquetFile(raw)
        place = only_column(list(table.schema_arrow.names), column, path)
        _check_type(table.schema_arrow.types[place], column, path)
        for batch in table.iter_batches(batch_size=rows_per_chunk, columns=[column]):
            raws = _as_bytes(batch.column(0)).to_pylist()
            places = [f"row {row} of {path}" for row in range(first_row, first_row + len(raws))]
            cells = [
                None if cell is None else _text(cell, where, errors, counts)
                for where, cell in zip(places, raws, strict=True)
            ]
            yield pd.Series(cells, places, dtype=object)
            first_row += len(cells)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a sound .parquet table: {reason}. Get a whole copy.") from error


def _check_type(kind: Any, column: str, path: Path) -> None:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    texts = (
        "string",
        "large_string",
        "string_view",
        "binary",
        "large_binary",
        "binary_view",
        "fixed_size_binary",
    )
    if not types.is_null(kind) and not any(
        getattr(types, f"is_{name}", lambda _: False)(kind) for name in texts
    ):
        raise DataError(f"{path}: column {column!r} holds {kind}, not text. Use --text-column NAME.")


def _as_bytes(column: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary())


def _text(cell: bytes, where: str, errors: str, counts: Counts) -> str:
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
