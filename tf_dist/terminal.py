"""The only module that writes to terminals and logs: it escapes untrusted text.

It comes from corpora, file names, models that write, and messages that quote configurations. Characters that
a terminal obeys (escape sequences can hide text, rename the window, or type) and characters that reorder what
is read (Unicode's bidirectional overrides) are written as escapes. A terminal that cannot show a character
gets an escape as well; and where nobody reads any more (``| head``), nothing is written.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import select
import sys
from collections.abc import Callable
from typing import Any, TextIO

from tf_dist.errors import TfDistError, of_memory

# Exit code of a program in a pipe that nobody reads any more: 128 + SIGPIPE, as shells count it.
CLOSED_PIPE = 141
# C0 but for tab and line feed, a carriage return that ends no line, DEL, C1, and overrides of direction; also
# surrogates, which are bytes of a file name that are no UTF-8 (PEP 383).
OBEYED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)")


def printable(text: str) -> str:
    """Text in which nothing is left that a terminal obeys; line feeds and tabs stay."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def json_line(value: Any) -> str:
    """JSON on one line, in which nothing is left that `printable` would escape: it would be JSON no more."""
    text = json.dumps(value, ensure_ascii=False)
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def write(text: str, stream: TextIO | None = None, end: str = "\n") -> bool:
    """Print text, whatever it holds, and at once.

    Args:
        text: of anybody.
        stream: standard output if none is given.
        end: after it.

    Returns:
        Whether it could be written; False where nobody reads any more, and from then on.
    """
    stream = sys.stdout if stream is None else stream
    if stream is None or getattr(stream, "closed", False):  # as `>&-` leaves it
        return False
    try:
        stream.write(encoded(text + end, stream).decode(_encoding_of(stream)))
        stream.flush()
        return True
    except (OSError, ValueError):
        _give_up(stream)
        return False


def write_error(text: str) -> bool:
    """`write` to standard error."""
    return write(text, sys.stderr)


def is_read(descriptor: int) -> bool:
    """Whether a little can be written to a stream now: not to a full pipe, nor a terminal held by Ctrl-S."""
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        return bool(poll.poll(0))
    except OSError:
        return True  # let the write say so


def exit_code_of(program: Callable[[], int]) -> int:
    """Run a program of one process; its exit code, or that of an error of ours, which is said in one line."""
    tolerate_any_text()
    try:
        return program()
    except BrokenPipeError:
        _give_up(sys.stdout)
        return CLOSED_PIPE
    except (TfDistError, MemoryError) as error:
        ours = of_memory(error)
        write_error(f"error: {ours}")
        return ours.exit_code if isinstance(ours, TfDistError) else TfDistError.exit_code


def tolerate_any_text() -> None:
    """Let standard output and error take every character, whatever the locale, from ``print`` too."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a stream of a notebook or a test
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def encoded(text: str, stream: TextIO | None) -> bytes:
    """The bytes of what `write` would write, for whoever writes to a stream's descriptor by itself."""
    return printable(text).encode(_encoding_of(stream), "backslashreplace")


def _encoding_of(stream: TextIO | None) -> str:
    try:
        return codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name
    except LookupError:
        return "ascii"


def _give_up(stream: TextIO) -> None:
    """Let what is still in the buffer go nowhere, or Python would fail to flush it at its exit (120)."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
