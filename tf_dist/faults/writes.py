"""Files below a folder that cannot be written any more, or whose writer dies in the middle of a write.

Only where that was asked for, the functions that open files and write to them are replaced in this process.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL = "/dev/full"  # of which the kernel says that no space is left, at each write


class Writes:
    """What becomes of the writes of this process below a folder: nothing special until told otherwise."""

    def __init__(self) -> None:
        self._folder, self._full, self._left = "", False, 0
        self._open, self._write, self._pwrite = builtins.open, os.write, os.pwrite

    def below(self, folder: Path) -> None:
        """The folder whose files are meant."""
        self._folder = os.path.join(os.path.realpath(folder), "")

    def fill(self) -> None:
        """From now on the disk is full: what is opened there for writing fails at its first write."""
        self._full = True
        self._install()

    def cut(self, call: int) -> None:
        """The k-th write call from now on writes a half, and then the process is killed."""
        self._left = call
        self._install()

    def _install(self) -> None:
        builtins.open = io.open = self._opened
        os.write, os.pwrite = self._written, self._pwritten

    def give_back(self) -> None:
        """Let files be written as ever."""
        builtins.open = io.open = self._open
        os.write, os.pwrite = self._write, self._pwrite

    def _is_below(self, path: object) -> bool:
        if not self._folder or not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.realpath(os.fsdecode(path)).startswith(self._folder)

    # In place of the builtin functions -----------------------------------------------------------

    def _opened(self, file: Any, mode: str = "r", *arguments: Any, **words: Any) -> Any:
        if not set(mode) & set("wax+") or not self._is_below(file):
            return self._open(file, mode, *arguments, **words)
        if self._full:
            words["opener"] = lambda *_: os.open(FULL, os.O_RDWR)
            return self._open(file, mode, *arguments, **words)
        raw = _CutFile(file, mode.replace("b", "").replace("t", ""), self._counted)
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return binary
        return io.TextIOWrapper(binary, words.get("encoding"), words.get("errors"), words.get("newline"))

    def _written(self, fd: int, data: Any) -> int:
        self._check_full(fd)
        return self._counted(lambda part: self._write(fd, part), data, self._is_file(fd))

    def _pwritten(self, fd: int, data: Any, offset: int) -> int:
        self._check_full(fd)
        return self._counted(lambda part: self._pwrite(fd, part, offset), data, self._is_file(fd))

    def _check_full(self, fd: int) -> None:
        if self._full and self._is_below(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_file(self, fd: int) -> bool:
        return self._left > 0 and self._is_below(f"/proc/self/fd/{fd}")

    def _counted(self, write: Callable[[Any], int | None], data: Any, counts: bool = True) -> int:
        """Write; half of it where this is the call that was meant, and no more."""
        if counts and self._left > 0:
            self._left -= 1
            if not self._left:
                whole = memoryview(data).cast("B")
                write(whole[: len(whole) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        return write(data) or 0


class _CutFile(io.FileIO):
    """A file of which each system call that writes is counted."""

    def __init__(self, file: Any, mode: str, counted: Callable[..., int]) -> None:
        super().__init__(file, mode)
        self._counted = counted

    def write(self, data: Any) -> int:
        """As of any file."""
        return self._counted(super().write, data)
