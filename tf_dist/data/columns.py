"""The columns of a table that are asked for, and invalid characters in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tf_dist.data.decoding import REPLACEMENT, Counts
from tf_dist.errors import DataError

NAMES_SHOWN = 20


@dataclass(frozen=True)
class Column:
    """A column that is asked for.

    Args:
        name: in the header of the table.
        option: the flag that names it, for error messages.
        labels: whether numbers and booleans will do as well as text; they become their JSON spelling.
        required: in a table of JSON lines, whether its absence from the first row is an error. Otherwise it
            is null there, and must only be somewhere.
    """

    name: str
    option: str = "--text-column"
    labels: bool = False
    required: bool = False


def only_column(names: Sequence[str], column: Column, path: Path) -> int:
    """Index of a column name.

    Raises:
        DataError: there is none of that name, or more than one.
    """
    name = column.name
    if name not in names:
        raise no_column(path, column, names)
    if names.count(name) > 1:
        raise DataError(
            f"{path} has {names.count(name)} columns {name!r}. Rename all but the one with the text."
        )
    return names.index(name)


def no_column(path: Path, column: Column, names: Sequence[str]) -> DataError:
    """The error for a table without the requested column."""
    shown = [name if name and name == name.strip() else repr(name) for name in names[:NAMES_SHOWN]]
    listed = ", ".join(shown) + (", ..." if len(names) > NAMES_SHOWN else "")
    alone = names[0] if len(names) == 1 else ""
    separator = next((sign for sign in (";", "\t", "|", ",") if sign in alone), "")
    hint = f" Cells seem to be separated by {separator!r}: .csv means commas, .tsv tabs." if separator else ""
    return DataError(
        f"{path} has no column {column.name!r}. Columns: {listed}. Use {column.option} NAME.{hint}"
    )


def is_null(cell: Any) -> bool:
    """Whether a cell has no value: null, or NaN, as JSON of Python and Parquet can spell it."""
    return cell is None or (isinstance(cell, float) and cell != cell)


def label(cell: bool | int | float) -> str:
    """The JSON spelling of a number or boolean."""
    return json.dumps(cell)


def without_surrogates(text: str, counts: Counts) -> str:
    """Replace unpaired surrogates by U+FFFD, and count them."""
    counts.replaced += sum(0xD800 <= ord(sign) < 0xE000 for sign in text)
    return "".join(REPLACEMENT if 0xD800 <= ord(sign) < 0xE000 else sign for sign in text)
