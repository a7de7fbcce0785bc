"""The text column of a table, and invalid characters in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tf_dist.data.decoding import REPLACEMENT, Counts
from tf_dist.errors import DataError

NAMES_SHOWN = 20


def only_column(names: Sequence[str], column: str, path: Path) -> int:
    """Index of a column name.

    Raises:
        DataError: there is none of that name, or more than one.
    """
    if column not in names:
        raise no_column(path, column, names)
    if names.count(column) > 1:
        raise DataError(
            f"{path} has {names.count(column)} columns {column!r}. Rename all but the one with the text."
        )
    return names.index(column)


def no_column(path: Path, column: str, names: Sequence[str]) -> DataError:
    """The error for a table without the requested column."""
    shown = [name if name and name == name.strip() else repr(name) for name in names[:NAMES_SHOWN]]
    listed = ", ".join(shown) + (", ..." if len(names) > NAMES_SHOWN else "")
    alone = names[0] if len(names) == 1 else ""
    separator = next((sign for sign in (";", "\t", "|", ",") if sign in alone), "")
    hint = f" Cells seem to be separated by {separator!r}: .csv means commas, .tsv tabs." if separator else ""
    return DataError(f"{path} has no column {column!r}. Columns: {listed}. Use --text-column NAME.{hint}")


def without_surrogates(text: str, counts: Counts) -> str:
    """Replace unpaired surrogates by U+FFFD, and count them."""
    counts.replaced += sum(0xD800 <= ord(sign) < 0xE000 for sign in text)
    return "".join(REPLACEMENT if 0xD800 <= ord(sign) < 0xE000 else sign for sign in text)
