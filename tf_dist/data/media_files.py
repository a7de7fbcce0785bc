"""Sound and image files that rows of a table name, relative to the table's folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from tf_dist.errors import DataError
from tf_dist.untrusted_files import shown


def file_of_row(table: Path, name: str, where: str) -> Path:
    """The path of a file that a cell names.

    A table can come from elsewhere, and must not make us open files outside its folder: absolute names and
    ``..`` are refused.

    Args:
        table: path of the table.
        name: the cell, with ``/`` between folders.
        where: location of the row for error messages, such as ``row 3 of sounds.csv (line 4)``.

    Raises:
        DataError: no name, or one that leaves the folder of the table.
    """
    pure = PurePosixPath(name)
    if not name.strip() or "\0" in name:
        raise DataError(f"{where} names no file: {shown(name)}. Name one relative to {table.parent}/.")
    if pure.is_absolute() or ".." in pure.parts:
        raise DataError(
            f"{where} names {shown(name)}, which is not below {table.parent}/. "
            "Put the table into the folder of its files, and name them relative to it."
        )
    return table.parent / pure
