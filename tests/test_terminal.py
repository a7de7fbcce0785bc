"""Text of anybody on a terminal: nothing that it obeys, and no error where it cannot be shown."""

import io
import json
import os
import subprocess
import sys

import pytest

from tf_dist import terminal
from tf_dist.errors import UsageError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n河", "plain\ttext\n河"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("\x9b2J\x7f\x00\b", r"\x9b2J\x7f\x00\x08"),
        ("a\r\nb\rc", "a\r\nb\\rc"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text, shown):
    assert terminal.printable(text) == shown


def stream(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "é河".encode()), ("latin-1", b"\xe9\\u6cb3"), ("ascii", b"\\xe9\\u6cb3")],
)
def test_what_cannot_be_shown_is_escaped(encoding, shown):
    out = stream(encoding)
    assert terminal.write("é河", out, end="")
    assert out.buffer.getvalue() == shown


def test_where_nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        assert not terminal.write("x" * 100_000, out)
    # Closing it has written what was left to nowhere, and raised nothing.
    assert not terminal.write("more", out)


@pytest.mark.parametrize("out", ["| head -c 20", ">&-"])
def test_a_program_whose_reader_leaves(out):
    """As of any program in a pipe: no traceback, and its own exit code where it goes on."""
    program = "from tf_dist import terminal; [terminal.write('x' * 99) for _ in range(9999)]"
    command = f'set -o pipefail; {sys.executable} -c "{program}" {out}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("no \x1b[2J such"), 64, "error: no \\x1b[2J such\n"),
        (MemoryError("of 9 GB"), 71, "error: a rank is out of memory"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_errors_of_a_program(error, code, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream("utf-8"))  # has no descriptor to be turned away

    def program():
        raise error

    assert terminal.exit_code_of(program) == code
    assert capsys.readouterr().err.startswith(said)


def test_a_line_of_json_stays_json():
    """Models write anything: DEL, C1 and overrides of direction are escaped as JSON has it."""
    row = {"text": "".join(map(chr, (0, 9, 10, 13, 27, 0x7F, 0x85, 0x9B, 0x202E, 0x2066, 0xFC, 0x6F22)))}
    line = terminal.json_line(row)
    assert terminal.printable(line) == line and json.loads(line) == row
    assert "ü漢" in line
