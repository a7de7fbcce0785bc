"""Who is shown what: bars on a terminal, lines elsewhere, nothing on ranks above 0."""

import contextlib
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from types import SimpleNamespace

import pytest

from tf_dist import processes, progress
from tf_dist.progress import CountedSequence, ProgressTask, TaskLines, fitted


@pytest.fixture(autouse=True)
def nothing_shown():
    yield
    progress.end()
    progress._width = 0


class Terminal:
    """A terminal of our own, and what was written to it."""

    def __init__(self, columns):
        self.master, self.slave = pty.openpty()
        ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def run(self, code, *words, **environment):
        """Run Python on it, and give the lines that were to be seen on it, one after another."""
        outside = {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdin=subprocess.DEVNULL, stdout=self.slave,
            stderr=self.slave, start_new_session=True, env={**os.environ, **outside, **environment},
        )  # fmt: skip
        os.close(self.slave)
        written = b""
        try:
            while block := os.read(self.master, 4096):
                written += block
        except OSError:  # nobody has it open any more
            pass
        os.close(self.master)
        assert process.wait(60) == 0, written
        text = re.sub(r"\x1b\[[0-9;?]*[mhl]", "", written.decode())
        return [line for line in re.split(r"\x1b\[2K|\x1b\[1A|[\r\n]+", text) if line.strip()]


WORK = """
import sys, time
from tf_dist import progress
print("shown as", progress.begin(sys.argv[1], first=sys.argv[2] == "0"))
with progress.task("tokenizing [bold]the text", total=3e6, unit="bytes") as task:
    task.advance(1e6)
    print("said meanwhile")
    with progress.task("something whose name is much longer than any terminal is wide, " * 3):
        time.sleep(0.6)
print("done")
"""


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_bars_on_a_terminal_fit_it(columns):
    lines = Terminal(columns).run(WORK, "auto", "0")
    assert lines[0] == "shown as bar" and lines[-1] == "done" and "said meanwhile" in lines
    assert any("1.0 of 3.0 MB" in line for line in lines) or columns == 50
    assert any(line.startswith(("- tok", "/ tok", "| tok", "\\ tok")) for line in lines)
    assert max(map(len, lines)) < columns


def test_a_terminal_without_our_signs():
    lines = Terminal(80).run(
        WORK.replace("the text", "caf\u00e9 \u4e2d"), "auto", "0", PYTHONIOENCODING="ascii"
    )
    assert lines[0] == "shown as bar" and lines[-1] == "done" and "said meanwhile" in lines


@pytest.mark.parametrize("words", [("plain", "0"), ("none", "0"), ("auto", "1"), ("bar", "1")])
def test_no_bars(words):
    assert Terminal(80).run(WORK, *words)[1:] == ["said meanwhile", "done"]


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"OMPI_COMM_WORLD_SIZE": "2"}])
def test_no_bars_on_what_is_no_terminal_for_them(variables):
    """Open MPI gives each rank a terminal of its own; without its launcher nobody knows what is behind."""
    assert Terminal(80).run(WORK, "auto", "0", **variables)[0] == "shown as plain"


def test_the_terminal_of_a_rank_is_that_of_its_launcher(tmp_path, monkeypatch):
    terminal, file = Terminal(123), tmp_path / "log"
    fds = tmp_path / "7" / "fd"
    fds.mkdir(parents=True)
    (fds / "1").symlink_to(os.ttyname(terminal.slave))
    (fds / "2").symlink_to(file)
    file.touch()
    launcher = processes.Process(7, "prterun", "S", 1, 0)
    monkeypatch.setattr(processes, "PROC", tmp_path)
    monkeypatch.setattr(processes, "launcher_above", lambda pid: None if pid == 7 else launcher)
    environment = {"TERM": "xterm", "OMPI_COMM_WORLD_SIZE": "2"}
    assert progress.terminal_width(1, environment) == 123
    assert progress.terminal_width(2, environment) == 0
    file.unlink()
    assert progress.terminal_width(2, environment) == 0


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    """They are on stderr: stdout may be somebody's data."""
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    assert progress.begin("plain") == "plain"
    with progress.task("tokenizing", 200, "rows") as task:
        task.advance(50)
        said = ""
        while said.count("\n") < 2:
            said += capsys.readouterr().err
    assert re.match(r"tokenizing \.\.\. 50 of 200 rows, 0:0\d left\n", said)
    assert capsys.readouterr().out == ""


def test_short_work_is_not_spoken_of(capsys):
    progress.begin("plain")
    with progress.task("tokenizing"):
        pass
    assert capsys.readouterr() == ("", "")
    assert isinstance(progress._shown, TaskLines) and not progress._shown._over


def test_nothing_is_shown_until_a_program_asks_for_it(capsys):
    with progress.task("x") as task:
        task.advance()
    assert isinstance(progress._shown, progress.NoTask) and capsys.readouterr() == ("", "")


def test_an_error_ends_a_task(monkeypatch):
    progress.begin("plain")
    with pytest.raises(KeyError), progress.task("x"):
        raise KeyError
    assert not progress._shown._over


@pytest.mark.parametrize(
    ("done", "total", "unit", "text"),
    [
        (0, 0, "", "1:01:01"),
        (5, 0, "rows", "5 rows, 1:01:01"),
        (0, 10, "rows", "0 of 10 rows"),
        (5, 10, "", "5 of 10, 1:01:01 left"),
        (2.5e6, 5e6, "bytes", "2.5 of 5.0 MB, 1:01:01 left"),
        (11, 10, "rows", "11 of 10 rows"),  # what was only guessed
    ],
)
def test_how_far_it_has_come(done, total, unit, text):
    task = ProgressTask("x", total, unit)
    task.done, task.begun = done, time.monotonic() - 3661.5
    assert task.text == text


def test_a_resumed_run_is_not_taken_for_a_fast_one():
    task = ProgressTask("x", 100, "steps")
    task.first, task.done, task.begun = 50, 75, time.monotonic() - 60.5
    assert task.text == "75 of 100 steps, 1:00 left"


def test_a_sequence_that_counts_how_far_it_was_read():
    task = ProgressTask("x", 6)
    items = CountedSequence("abcdef", task)
    assert items[2:4] == "cd" and task.done == 2
    assert items[1] == "b" and task.done == 2
    assert list(items) == list("abcdef") and task.done == 5


def test_long_lines_are_broken_below_their_text():
    line = "model     " + " ".join(["transformer"] * 12)
    for part in fitted(line, 60).split("\n"):
        assert len(part) < 60
    assert fitted(line, 60).split("\n")[1].startswith(" " * 10 + "transformer")
    assert fitted(line, 60).replace("\n" + " " * 9, "") == line
    assert fitted(line, 0) == line and fitted("short\n", 60) == "short\n"
    assert fitted("a /path/" + "x" * 90, 60).split("\n")[1] == "/path/" + "x" * 90  # to be copied


def test_bars_whose_reader_has_gone(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        assert progress.begin("bar") == "bar"
        with progress.task("x") as task:
            task.advance()
        progress.end()
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            pipe.close()


def test_a_reader_that_has_gone_does_not_end_the_work(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    waits = iter([False, True])
    over = SimpleNamespace(wait=lambda seconds: next(waits))
    progress._tell(ProgressTask("x"), over)
