"""Well-known corpora by name: ``data/datasets.yaml`` -> a verified file in the downloads folder."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tf_dist import terminal
from tf_dist.atomic_io import read_capped
from tf_dist.data.sources import STDLIB
from tf_dist.errors import DataError
from tf_dist.untrusted_files import parsed_yaml, shown

# In a checkout a link to data/datasets.yaml; in an installed package that file itself.
REGISTRY = Path(__file__).with_name("datasets.yaml")
REGISTRY_LIMIT_BYTES = 1 << 20
READ_TIMEOUT_S = 30.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FILE_KEYS = {"urls", "size_bytes", "sha256", "member", "text_size_bytes", "text_sha256"}


@dataclass(frozen=True)
class RemoteFile:
    """One split of a corpus: where it lies, and what is known of it; None where nothing is.

    ``size_bytes`` and ``sha256`` are of the download. If that is a zip, ``member`` is the file in it, and
    ``text_size_bytes`` and ``text_sha256`` are of that.
    """

    urls: tuple[str, ...]
    size_bytes: int | None
    sha256: str | None
    member: str | None
    text_size_bytes: int | None
    text_sha256: str | None


@dataclass(frozen=True)
class Dataset:
    """A corpus of the registry; ``files`` by split, of which ``train`` is always there."""

    name: str
    licence: str
    files: Mapping[str, RemoteFile]


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
    if not NAME.fullmatch(name) or not isinstance(files, dict) or "train" not in files:
        raise DataError(f"{path}: {shown(name)} needs a plain name, and `files` with at least `train`.")
    checked = {}
    for split, fields in files.items():
        if not NAME.fullmatch(str(split)) or not _is_file_entry(fields):
            raise DataError(
                f"{path}: {name}, {shown(split)}: wrong fields. Known: {' '.join(sorted(FILE_KEYS))}."
            )
        values = {key: fields.get(key) for key in FILE_KEYS}
        checked[str(split)] = RemoteFile(**{**values, "urls": tuple(fields["urls"])})
    return Dataset(name, str(entry.get("licence", "")), checked)


def _is_file_entry(fields: Any) -> bool:
    if not isinstance(fields, dict) or not set(fields) <= FILE_KEYS:
        return False
    urls = fields.get("urls")
    return (
        isinstance(urls, list)
        and bool(urls)
        and all(isinstance(url, str) and re.fullmatch(r"https?://[!-~]+", url) for url in urls)
        and all(_is_size(fields.get(key)) for key in ("size_bytes", "text_size_bytes"))
        and all(_is_sha256(fields.get(key)) for key in ("sha256", "text_sha256"))
        and isinstance(fields.get("member"), str | None)
    )


def _is_size(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _is_sha256(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)))


def fetch(
    name: str,
    registry_path: Path | str,
    folder: Path | str,
    say: Callable[[str], object] = terminal.write,
    *,
    timeout_s: float = READ_TIMEOUT_S,
) -> Path:
    """A corpus of the registry as a text file on this machine, downloaded unless it is here already.

    Args:
        name: ``NAME`` for its training text, or ``NAME/SPLIT``, as in ``wikitext-2/test``.
        registry_path: the YAML file.
        folder: downloads; the file becomes ``folder/NAME/SPLIT.txt``.
        say: told what is done, a line at a time.
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
    if split not in dataset.files:
        raise DataError(f"{base} has no part {split!r}. It has: {' '.join(dataset.files)}.")
    remote = dataset.files[split]
    target = Path(folder) / base / f"{split}.txt"
    if remote.member is None:
        wanted = download.Wanted(remote.size_bytes, remote.sha256)
        download.obtain(remote.urls, target, wanted, target, timeout_s, say)
        return target
    text = download.Wanted(remote.text_size_bytes, remote.text_sha256)
    if not download.is_intact(target, text, say):
        archive = target.parent / (_last_part(remote.urls[0]))
        wanted = download.Wanted(remote.size_bytes, remote.sha256)
        download.obtain(remote.urls, archive, wanted, target, timeout_s, say)
        download.unzip(archive, remote.member, target, text, say)
    return target


def _last_part(url: str) -> str:
    part = re.sub(r"[^A-Za-z0-9._-]", "_", url.split("?")[0].rstrip("/").rsplit("/", 1)[-1])
    return f"archive-{part}"


def resolve_sources(
    values: Sequence[str],
    registry_path: Path | str,
    downloads_dir: Path | str,
    say: Callable[[str], object] = terminal.write,
) -> tuple[str, ...]:
    """``--data`` values with every name of the registry replaced by the path of its file.

    What exists as a file or folder is that file, also when it is named like a corpus of the registry.

    Raises:
        DataError: a value is neither a file, nor a glob, nor a name; or a download failed.
    """
    return tuple(_resolve(value, Path(registry_path), downloads_dir, say) for value in values)


def _resolve(value: str, registry: Path, downloads: Path | str, say: Callable[[str], object]) -> str:
    is_pattern = any(sign in value for sign in "*?[")
    if value == STDLIB or is_pattern or Path(value).exists() or Path(value).is_symlink():
        return value
    if not registry.is_file():
        raise DataError(f"no such file or folder: {value}. (No registry of names at {registry} either.)")
    if value.partition("/")[0] not in read_registry(registry):
        raise _unknown(value, list(read_registry(registry)))
    return str(fetch(value, registry, downloads, say))


def _unknown(name: str, known: list[str]) -> DataError:
    names = [*known, STDLIB]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return DataError(
        f"no such file or folder: {name}, and no corpus of that name.{hint} Known names: {' '.join(names)}."
    )
