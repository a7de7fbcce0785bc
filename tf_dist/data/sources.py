"""``--data`` values -> the list of files to read, in an order every machine agrees on."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tf_dist.data.decoding import COMPRESSIONS, split_name
from tf_dist.errors import DataError

STDLIB = "stdlib"
TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES, ".parquet")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
# Not part of the standard library, though in its folder.
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus, as it was when it was listed.

    ``named`` is True for a file that the user named explicitly: without text it is then an error,
    and not merely skipped. ``stdlib`` files are skipped if they are duplicates or not UTF-8.
    """

    path: Path
    label: str
    size_bytes: int
    mtime_ns: int
    named: bool = False
    stdlib: bool = False

    @property
    def kind(self) -> str:
        """The suffix of its format, without that of a compression: ``.txt``, ``.csv``, ..."""
        return kind_of(self.path)


def kind_of(path: Path, suffixes: Sequence[str] = SUFFIXES) -> str:
    """The suffix of a file's format, or an empty string if it is none of ``suffixes`` (lower case)."""
    suffix, compression = split_name(path.name)
    # Parquet compresses its columns itself, and is read from its end.
    return suffix if suffix in suffixes and not (compression and suffix == ".parquet") else ""


def find_files(
    values: Sequence[str], passed_over: Counter[str] | None = None, suffixes: Sequence[str] = SUFFIXES
) -> list[SourceFile]:
    """Every file of the values, each once, in the order of the values and sorted inside each.

    Args:
        values: ``stdlib``, files, globs or folders. In folders and globs files of other suffixes are
            skipped, and so are hidden files and folders inside a folder.
        passed_over: counts the files, except hidden ones, of each unsupported suffix.
        suffixes: that are supported, lower case.

    Raises:
        DataError: no file, an unknown suffix, a loop of links, not a regular file, not readable.
    """
    found: dict[str, SourceFile] = {}
    passed_over = Counter() if passed_over is None else passed_over
    for value in values:
        for file in _expand(value, passed_over, suffixes):
            # A file matched twice is read once, else it would count twice in training.
            found.setdefault(os.path.realpath(file.path), file)
    if not found:
        raise DataError("no data: give --data a file, a glob, a folder or `stdlib`.")
    return list(found.values())


def _expand(value: str, passed_over: Counter[str], suffixes: Sequence[str]) -> list[SourceFile]:
    if value == STDLIB:
        return _stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
    if os.path.lexists(value):
        return _expand_path(Path(value), passed_over, suffixes)
    if glob.has_magic(value):
        return _expand_glob(value, passed_over, suffixes)
    raise DataError(f"no such file or folder: {value}. Check the path; it is taken from {Path.cwd()}.")


def _expand_path(path: Path, passed_over: Counter[str], suffixes: Sequence[str]) -> list[SourceFile]:
    if stat.S_ISDIR(_status(path).st_mode):
        files = list(_walk(path, (), passed_over, suffixes))
        if not files:
            raise DataError(f"no {_known(suffixes)} file in the folder {path}. Name the files themselves.")
        return files
    if not kind_of(path, suffixes):
        remedy = "Unpack it first." if split_name(path.name)[0] in ARCHIVES else "Rename or convert it."
        raise DataError(f"{path} is of an unsupported file type: we read {_known(suffixes)}. {remedy}")
    return [_source(path, named=True)]


def _expand_glob(pattern: str, passed_over: Counter[str], suffixes: Sequence[str]) -> list[SourceFile]:
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise DataError(f"no file matches {pattern}. Quote it, and check it against {Path.cwd()}.")
    files: list[SourceFile] = []
    for match in map(Path, matches):
        if stat.S_ISDIR(_status(match).st_mode):
            files.extend(_walk(match, (), passed_over, suffixes))
        elif kind_of(match, suffixes):
            files.append(_source(match))
        else:
            passed_over["".join(split_name(match.name))] += 1
    if not files:
        raise DataError(f"no {_known(suffixes)} file among the {len(matches)} matches of {pattern}.")
    return files


def _walk(
    folder: Path, above: tuple[tuple[int, int], ...], passed_over: Counter[str], suffixes: Sequence[str]
) -> Iterator[SourceFile]:
    """The known files under a folder, following links; ``above`` are the enclosing folders."""
    status = _status(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise DataError(f"{folder} is a link back to a folder around it. Remove the link, or use a glob.")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}. Check its permissions.") from error
    for path in (folder / name for name in names if not name.startswith(".")):
        if stat.S_ISDIR(_status(path).st_mode):
            yield from _walk(path, (*above, identity), passed_over, suffixes)
        elif kind_of(path, suffixes):
            yield _source(path)
        else:
            passed_over["".join(split_name(path.name))] += 1


def _source(path: Path, named: bool = False) -> SourceFile:
    status = _status(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a regular file. Copy what it gives into a file first.")
    return SourceFile(path, str(path), status.st_size, status.st_mtime_ns, named)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}. Check the path, or remove the link."
        ) from error


def _known(suffixes: Sequence[str]) -> str:
    return f"{' '.join(suffixes)} (all but .parquet also with {' '.join(COMPRESSIONS)})"


def _stdlib_files(root: Path) -> list[SourceFile]:
    found: dict[str, Path] = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in NOT_STDLIB]
        inside = Path(folder).relative_to(root)
        found.update(
            {(inside / name).as_posix(): Path(folder, name) for name in names if name.endswith(".py")}
        )
    files = []
    for label in sorted(found):
        status = _status(found[label])
        files.append(SourceFile(found[label], label, status.st_size, status.st_mtime_ns, stdlib=True))
    if not files:
        raise DataError(f"this Python's standard library has no sources in {root}. Use --data FILE.")
    return files


def cap(files: Sequence[SourceFile], max_bytes: int) -> list[SourceFile]:
    """Limit the standard library's files to ``max_bytes`` (0: all); other files are unaffected.

    A hash of their names selects them, so a small corpus is a sample of the full library
    and not its first letters; every machine with the same library selects the same ones.

    Raises:
        DataError: not even one of them fits.
    """
    pool = [file for file in files if file.stdlib]
    if not pool or not max_bytes:
        return list(files)
    kept, total = set(), 0
    for file in sorted(pool, key=lambda file: hashlib.sha256(file.label.encode()).digest()):
        if file.size_bytes and total + file.size_bytes <= max_bytes:
            kept.add(file.path)
            total += file.size_bytes
    if not kept:
        raise DataError(
            f"no file of the standard library is as small as {max_bytes} bytes. Raise --max-bytes."
        )
    return [file for file in files if not file.stdlib or file.path in kept]


def fingerprint(files: Iterable[SourceFile]) -> list[list[str | int]]:
    """Facts that must not change for prepared tokens to stay valid: [path, size in bytes, mtime in ns]."""
    lines: list[list[str | int]] = []
    for file in files:
        if file.stdlib:
            # Installation times differ between equal libraries; the version tells libraries apart.
            lines.append([f"{STDLIB} {sys.version_info[:3]} {file.label}", file.size_bytes, 0])
        else:
            lines.append([os.path.abspath(file.path), file.size_bytes, file.mtime_ns])
    return lines


def files_sha256(files: Iterable[SourceFile]) -> str:
    """The SHA-256 of their `fingerprint`, not of their contents."""
    return hashlib.sha256(json.dumps(fingerprint(files)).encode()).hexdigest()
