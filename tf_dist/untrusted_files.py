"""The only module that opens files that may be somebody else's: runs, checkpoints, corpora, settings.

A run folder can come out of an archive that a stranger packed, and a corpus out of a download. So a file is
opened without waiting (a named pipe, a device), must be a regular file, is read up to a limit of its kind,
and YAML and JSON are parsed with limits of their own. What lies in a run folder is never reached through a
link, whether it is read, appended to or locked; files that are replaced go by way of `tf_dist.atomic_io`.

Whatever is refused is an `OSError` with a `strerror` that says why, so that callers name the path and the way
out in their own words. `tests/test_untrusted_files.py` keeps other modules from opening files by themselves.
"""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

# Limits of files that we write small, and people edit by hand.
CONFIG_LIMIT_BYTES = 1 << 20
STATUS_LIMIT_BYTES = 4 << 20
LINE_LIMIT_BYTES = 1 << 20
# JSON and YAML nested deeper than this were not written by us, and would end in a RecursionError somewhere.
DEPTH_LIMIT = 64
# Values in a YAML text, each counted as often as aliases repeat it.
NODES_LIMIT = 10_000
# Of a YAML value that is no text. Long numbers take time that grows with the square of their length.
SCALAR_LIMIT = 128
LONGEST_SHOWN = 300
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}
SAFE = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 2, 3, 3, 3
_short.maxstring, _short.maxlong, _short.maxother = 120, 40, 80


def shown(value: object) -> str:
    """A value out of a foreign file for an error message: its `repr`, cut where it is long."""
    text = _short.repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def opened(path: Path | str, *, follow: bool) -> BinaryIO:
    """A regular file for reading.

    Args:
        path: of the file.
        follow: whether it may be a symbolic link; not where it lies in a run folder.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    return os.fdopen(_descriptor(path, os.O_RDONLY, follow), "rb")


def opened_to_append(path: Path | str) -> int:
    """The descriptor of a regular file for appending, made if it is not there; never through a link.

    Raises:
        OSError: it cannot be opened, is no regular file, or has another name (a hard link) elsewhere.
    """
    handle = _descriptor(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, follow=False)
    return _only_name(handle, path)


def opened_to_lock(path: Path | str) -> int:
    """The descriptor of a small file for reading, writing and locking; as `opened_to_append` does it."""
    return _only_name(_descriptor(path, os.O_RDWR | os.O_CREAT, follow=False), path)


def append(path: Path | str, data: bytes) -> None:
    """Append to a file, never through a link. Raises `OSError`, see `opened_to_append`."""
    handle = opened_to_append(path)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
    finally:
        os.close(handle)


def read_bytes(path: Path | str, limit_bytes: int, *, follow: bool) -> bytes:
    """All of a file that we expect to be small.

    Raises:
        OSError: see `opened`; or it is larger than ``limit_bytes``.
    """
    with opened(path, follow=follow) as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        what = f"larger than {limit_bytes:,} bytes, so it is not what we expected"
        raise OSError(errno.EFBIG, what, str(path))
    return data


def read_json(path: Path | str, limit_bytes: int, *, follow: bool = False) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: see `read_bytes`.
        ValueError: it is not JSON, or nested too deeply.
    """
    return parsed_json(read_bytes(path, limit_bytes, follow=follow))


def parsed_json(data: bytes | str) -> Any:
    """The value of JSON text. Raises `ValueError` where it is none, or nested too deeply."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEPTH_LIMIT} deep") from error
    _check_depth(value)
    return value


def parsed_yaml(data: bytes | str) -> Any:
    """The value of YAML text.

    Raises:
        ValueError: it is not YAML, stands for too much (``*alias``), or is nested too deeply.
    """
    try:
        return yaml.load(data, _PlainLoader)  # noqa: S506 - a SafeLoader with fewer words
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEPTH_LIMIT} deep") from error


def lines(path: Path | str, *, follow: bool = False) -> Iterator[bytes]:
    """The lines of a file of any length, one after another; of a line that is too long only the beginning.

    Raises:
        OSError: see `opened`.
    """
    with opened(path, follow=follow) as file:
        while line := file.readline(LINE_LIMIT_BYTES):
            yield line
            while not line.endswith(b"\n") and len(line) == LINE_LIMIT_BYTES:
                line = file.readline(LINE_LIMIT_BYTES)


def check_folder(path: Path) -> None:
    """Raise `OSError` where a folder of a run is a link, or something else than a folder; absent is fine."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise OSError(errno.ENOTDIR, _is_not("a folder", mode), str(path))


def _descriptor(path: Path | str, flags: int, follow: bool) -> int:
    if not follow:
        flags |= os.O_NOFOLLOW
    try:
        handle = os.open(path, flags | SAFE, 0o666)  # less what the umask takes away
    except OSError as error:
        _say_what_it_is(path, error)
        raise
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise OSError(errno.EINVAL, _is_not("a regular file", mode), str(path))
    os.set_blocking(handle, True)
    return handle


def _say_what_it_is(path: Path | str, error: OSError) -> None:
    """Where opening fails because of what a file is (a link: ELOOP, a pipe: ENXIO), say that instead."""
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
        raise OSError(error.errno, _is_not("a regular file", mode), str(path)) from error


def _only_name(handle: int, path: Path | str) -> int:
    """What has a second name may be a file of somebody's, linked into a folder that we were given."""
    if os.fstat(handle).st_nlink > 1:
        os.close(handle)
        raise OSError(
            errno.EMLINK, "it has another name (a hard link): copy it, and remove this one", str(path)
        )
    return handle


def _is_not(wanted: str, mode: int) -> str:
    return f"it is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not {wanted}"


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH_LIMIT:
            raise ValueError(f"it is nested more than {DEPTH_LIMIT} deep")
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(one.values())
            elif isinstance(one, list):
                inner.extend(one)
        level = [one for one in inner if isinstance(one, dict | list)]


class _PlainLoader(yaml.SafeLoader):
    """Plain values, and not too many of them: 1 KB with aliases may stand for 10^9 words."""

    depth = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As of the class above, within limits of depth, of the number of values, and of their length."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        sizes: dict[str, int] = self.__dict__.setdefault("sizes", {})  # of what has an anchor
        before = self.nodes
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _at(event.start_mark, "an alias of what is not there yet")
            self.nodes += sizes[event.anchor]
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.nodes > NODES_LIMIT:
            raise _at(event.start_mark, f"more than {NODES_LIMIT:,} values, with what aliases repeat")
        if self.depth > DEPTH_LIMIT:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not isinstance(event, yaml.AliasEvent) and event.anchor is not None:
            sizes[event.anchor] = self.nodes - before
        is_text = not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:str"
        if node is not None and not is_text and len(node.value) > SCALAR_LIMIT:
            raise _at(node.start_mark, "a number of this length is not taken")
        return node


def _at(mark: Any, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, what, mark)
