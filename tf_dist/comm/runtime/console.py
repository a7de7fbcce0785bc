"""`Output`: nonblocking console output; its reader may have stopped: a full pipe, a terminal held by Ctrl-S.

Training never waits for a reader. Text that cannot be written now is buffered, and written with later text.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections import deque

from tf_dist import terminal

# Can be written without blocking once the descriptor polls as writable (PIPE_BUF).
PIECE_BYTES = 4096
# Size of the buffer for a reader that does not read.
KEPT_BYTES = 1 << 20
# How long the end of a program waits for the reader.
END_LIMIT_S = 5.0
LOOK_EVERY_S = 0.02


class Output:
    """A nonblocking stream, except at the end of the program.

    Args:
        descriptor: of the stream.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._kept = descriptor, deque[bytes]()
        self._bytes, self._lost = 0, 0

    def say(self, text: str) -> None:
        """Write a line, now or later; discarded if the stream is closed."""
        raw = terminal.encoded(text + "\n", sys.stdout)
        self._kept.append(raw)
        self._bytes += len(raw)
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= len(self._kept.popleft())
            self._lost += 1
        self.flush()

    def flush(self, limit_s: float = 0.0) -> None:
        """Write the buffer, as far as the reader takes it within ``limit_s`` seconds."""
        deadline = time.monotonic() + limit_s
        while self._kept:
            if not terminal.is_read(self._descriptor):
                if time.monotonic() >= deadline:
                    return
                time.sleep(LOOK_EVERY_S)
                continue
            try:
                self._write_a_piece()
            except OSError:  # the reader has exited (`| head`), or the stream was closed (`>&-`)
                self._kept.clear()
                self._bytes = 0

    def _write_a_piece(self) -> None:
        if self._lost:
            self._kept.appendleft(f"({self._lost} lines were not read; they are in the log)\n".encode())
            self._bytes, self._lost = self._bytes + len(self._kept[0]), 0
        piece = self._kept[0][:PIECE_BYTES]
        written = os.write(self._descriptor, piece)
        self._bytes -= written
        rest = self._kept.popleft()[written:]
        if rest:
            self._kept.appendleft(rest)


_stdout = Output(1)
atexit.register(_stdout.flush, END_LIMIT_S)


def say(text: str) -> None:
    """Print a line on standard output, without blocking."""
    try:
        real = sys.stdout.fileno() == 1
    except (OSError, ValueError, AttributeError):  # pytest's or a notebook's stream, or none
        real = False
    # A progress bar replaces sys.stdout, so that lines are printed above the bar.
    is_drawn = real and sys.stdout is not sys.__stdout__ and terminal.is_read(1)
    if is_drawn:
        _stdout.flush()
    if is_drawn or not real:
        terminal.write(text)
        return
    if terminal.is_read(1):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()  # keep the order with earlier prints
    _stdout.say(text)


def flush(limit_s: float = 1.0) -> None:
    """Write buffered lines before a process exits at once, if there is a reader."""
    _stdout.flush(limit_s)
