"""What recipes give: rows, whose cells are texts, numbers, or files that go beside the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tf_dist.errors import DataError
from tf_dist.untrusted_files import read_bytes

# Of one file of a package that a recipe reads whole.
FILE_LIMIT_BYTES = 128 << 20


@dataclass(frozen=True)
class MediaFile:
    """A file beside the table; its cell holds ``name``, relative to the folder of the table."""

    name: str
    data: bytes


Row = Mapping[str, "str | int | float | MediaFile"]


@dataclass(frozen=True)
class TableRecipe:
    """How a table is made.

    Args:
        rows: from the folder in which packages were unpacked to rows, in an order that depends on the files
            alone.
        wanted: which files of packages are unpacked: globs over names inside a package, in which ``*`` stands
            for slashes, too.
        nested: which of these are archives (.tar.gz), and are unpacked where they lie.
        version: raised when the recipe gives other rows, so that tables are made again.
    """

    rows: Callable[[Path], Iterator[Row]]
    wanted: tuple[str, ...] = ()
    nested: str = ""
    version: int = 1


def only_file(folder: Path, pattern: str) -> Path:
    """The one file of an unpacked package that matches a glob. Raises `DataError` for none, or several."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"the package has {len(found)} files {pattern}, and the recipe expects one of them.")
    return found[0]


def text_of(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file. Raises `DataError` where it cannot be read, or is in another encoding."""
    try:
        return data_of(path).decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} of the package is not {encoding}: byte {error.start}.") from error


def data_of(path: Path, *, follow: bool = False) -> bytes:
    """The bytes of a file, which may be a link if ``follow``. Raises `DataError` where it cannot be read."""
    try:
        return read_bytes(path, FILE_LIMIT_BYTES, follow=follow)
    except OSError as error:
        raise DataError(f"cannot read {path.name} of the package: {error.strerror}.") from error
