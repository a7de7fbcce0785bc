"""Well-known corpora by name: ``data/datasets.yaml`` -> a verified file in the downloads folder.

An entry has ``files``, texts at addresses; or a ``table``, which a recipe makes from packages of Debian
and PyPI.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from tf_dist.atomic_io import read_capped
from tf_dist.data.package_sources import Sha256, TableSource, Url
from tf_dist.data.sources import STDLIB
from tf_dist.errors import DataError
from tf_dist.untrusted_files import parsed_yaml, shown

# In a checkout a link to data/datasets.yaml; in an installed package that file itself.
REGISTRY = Path(__file__).with_name("datasets.yaml")
REGISTRY_LIMIT_BYTES = 1 << 20
READ_TIMEOUT_S = 30.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Size = Annotated[int, msgspec.Meta(ge=0)]
# Of what is wrong with an entry that may be anybody's.
LONGEST_REASON = 300
S = TypeVar("S", bound=msgspec.Struct)


class RemoteFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One split of a corpus: where it lies, and what is known of it; None where nothing is.

    ``size_bytes`` and ``sha256`` are of the download. If that is a zip, ``member`` is the file in it, and
    ``text_size_bytes`` and ``text_sha256`` are of that.
    """

    urls: Annotated[tuple[Url, ...], msgspec.Meta(min_length=1)]
    size_bytes: Size | None = None
    sha256: Sha256 | None = None
    member: str | None = None
    text_size_bytes: Size | None = None
    text_sha256: Sha256 | None = None


@dataclass(frozen=True)
class Dataset:
    """A corpus of the registry: ``files`` by split, of which ``train`` is always there; or a ``table``."""

    name: str
    licence: str
    files: Mapping[str, RemoteFile]
    table: TableSource | None = None


def read_registry(path: Path | str) -> dict[str, Dataset]:
    """Every corpus that the registry at ``path`` knows, by name.

    Raises:
        DataError: not there, or not a registry; says which entry is wrong.
    """
    path = Path(path)
    try:
        entries = parsed_yaml(read_capped(path, REGISTRY_LIMIT_BYTES))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path} is not YAML: {error}") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path} is not a registry: want a mapping from names to corpora.")
    return {str(name): _dataset(str(name), entry, path) for name, entry in entries.items()}


def _dataset(name: str, entry: Any, path: Path) -> Dataset:
    files = entry.get("files") if isinstance(entry, dict) else None
    if isinstance(entry, dict) and "table" in entry and files is None and NAME.fullmatch(name):
        table = _converted(entry["table"], TableSource, f"{path}: {name}, table")
        return Dataset(name, str(entry.get("licence", "")), {}, table)
    if not NAME.fullmatch(name) or not isinstance(files, dict) or "train" not in files:
        raise DataError(
            f"{path}: {shown(name)} needs a plain name, and `files` with at least `train`, or `table`."
        )
    checked = {}
    for split, fields in files.items():
        if not NAME.fullmatch(str(split)):
            raise DataError(f"{path}: {name}: {shown(split)} is no plain name.")
        checked[str(split)] = _converted(fields, RemoteFile, f"{path}: {name}, {split}")
    return Dataset(name, str(entry.get("licence", "")), checked)


def _converted(fields: Any, kind: type[S], where: str) -> S:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: {str(error)[:LONGEST_REASON]}.") from error


def fetch(
    name: str,
    registry_path: Path | str,
    folder: Path | str,
    *,
    timeout_s: float = READ_TIMEOUT_S,
) -> Path:
    """A corpus of the registry as a file on this machine, downloaded or made unless it is here already.

    Args:
        name: ``NAME`` for its training text, or ``NAME/SPLIT``, as in ``wikitext-2/test``.
        registry_path: the YAML file.
        folder: downloads; a text becomes ``folder/NAME/SPLIT.txt``, a table ``folder/NAME/train.jsonl``.
        timeout_s: of each single read from the network.

    Raises:
        DataError: an unknown name, or no address gave the right file; says how to do without.
    """
    from tf_dist.data import download  # here, because most runs need no network code

    datasets = read_registry(registry_path)
    base, _, split = name.partition("/")
    if base not in datasets:
        raise _unknown(name, list(datasets))
    dataset = datasets[base]
    split = split or "train"
    if dataset.table is not None and split == "train":
        from tf_dist.data.recipe_tables import fetch_table  # here, because most runs need none

        return fetch_table(base, dataset.table, Path(folder))
    if split not in dataset.files:
        raise DataError(f"{base} has no part {split!r}. It has: {' '.join(dataset.files or ['train'])}.")
    remote = dataset.files[split]
    target = Path(folder) / base / f"{split}.txt"
    if remote.member is None:
        wanted = download.ExpectedFile(remote.size_bytes, remote.sha256)
        download.obtain(remote.urls, target, wanted, target, timeout_s)
        return target
    text = download.ExpectedFile(remote.text_size_bytes, remote.text_sha256)
    if not download.is_intact(target, text):
        archive = target.parent / (_last_part(remote.urls[0]))
        wanted = download.ExpectedFile(remote.size_bytes, remote.sha256)
        download.obtain(remote.urls, archive, wanted, target, timeout_s)
        download.unzip(archive, remote.member, target, text)
    return target


def _last_part(url: str) -> str:
    part = re.sub(r"[^A-Za-z0-9._-]", "_", url.split("?")[0].rstrip("/").rsplit("/", 1)[-1])
    return f"archive-{part}"


def resolve_sources(
    values: Sequence[str],
    registry_path: Path | str,
    downloads_dir: Path | str,
) -> tuple[str, ...]:
    """``--data`` values with every name of the registry replaced by the path of its file.

    What exists as a file or folder is that file, also when it is named like a corpus of the registry.

    Raises:
        DataError: a value is neither a file, nor a glob, nor a name; or a download failed.
    """
    return tuple(_resolve(value, Path(registry_path), downloads_dir) for value in values)


def _resolve(value: str, registry: Path, downloads: Path | str) -> str:
    is_pattern = any(sign in value for sign in "*?[")
    if value == STDLIB or is_pattern or Path(value).exists() or Path(value).is_symlink():
        return value
    if not registry.is_file():
        raise DataError(f"no such file or folder: {value}. (No registry of names at {registry} either.)")
    if value.partition("/")[0] not in read_registry(registry):
        raise _unknown(value, list(read_registry(registry)))
    return str(fetch(value, registry, downloads))


def _unknown(name: str, known: list[str]) -> DataError:
    names = [*known, STDLIB]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return DataError(
        f"no such file or folder: {name}, and no corpus of that name.{hint} Known names: {' '.join(names)}."
    )
