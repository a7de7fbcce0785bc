"""File write faults below a folder: a full disk, or a process killed in the middle of a write.

The functions that open and write files are replaced in this process only if such a fault is armed.
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

FULL = "/dev/full"  # every write to it fails with ENOSPC


class Writes:
    """Fault state of this process's writes below a folder: no faults by default."""

    def __init__(self) -> None:
        self._folder, self._full, self._left = "", False, 0
        self._open, self._write, self._pwrite = builtins.open, os.write, os.pwrite

    def below(self, folder: Path) -> None:
        """Set the folder of the affected files."""
        self._folder = os.path.join(os.path.realpath(folder), "")

    def fill(self) -> None:
        """Simulate a full disk: files opened for writing from now on fail at their first write."""
        self._full = True
        self._install()

    def cut(self, call: int) -> None:
        """Make the k-th write call from now on write one half, and then kill the process."""
        self._left = call
        self._install()

    def _install(self) -> None:
        builtins.open = io.open = self._opened
        os.write, os.pwrite = self._written, self._pwritten

    def give_back(self) -> None:
        """Restore the original functions."""
        builtins.open = io.open = self._open
        os.write, os.pwrite = self._write, self._pwrite

    def _is_below(self, path: object) -> bool:
        if not self._folder or not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.realpath(os.fsdecode(path)).startswith(self._folder)

    # Replacements of builtin functions -----------------------------------------------------------

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
        """Write; half of it, and no more, if this is the affected call."""
        if counts and self._left > 0:
            self._left -= 1
            if not self._left:
                whole = memoryview(data).cast("B")
                write(whole[: len(whole) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        return write(data) or 0


class _CutFile(io.FileIO):
    """A file whose write system calls are counted."""

    def __init__(self, file: Any, mode: str, counted: Callable[..., int]) -> None:
        super().__init__(file, mode)
        self._counted = counted

    def write(self, data: Any) -> int:
        """As of any file."""
        return self._counted(super().write, data)
