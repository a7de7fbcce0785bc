"""Lines for people who may not read them: nobody waits, and nothing is lost before its time."""

import fcntl
import os

import pytest

from tf_dist.comm.runtime import console
from tf_dist.comm.runtime.console import KEPT_BYTES, Output

SMALLEST = 4096


@pytest.fixture
def pipe():
    """A pipe of one page: reading and writing end."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, SMALLEST)
    yield ends
    for end in ends:
        os.close(end)


def everything(stream, end):
    """What is read until nothing more is written."""
    os.set_blocking(end, False)
    read = b""
    while True:
        stream.flush()
        try:
            read += os.read(end, 1 << 16)
        except BlockingIOError:
            return read.decode()


def test_lines_come_in_order_once_somebody_reads(pipe):
    stream, lines = Output(pipe[1]), [f"line {number} ü" for number in range(2000)]
    for line in lines:
        stream.say(line)  # returns, though nobody reads
    assert everything(stream, pipe[0]).splitlines() == lines


def test_a_line_longer_than_the_pipe(pipe):
    stream = Output(pipe[1])
    stream.say("x" * 3 * SMALLEST)
    assert everything(stream, pipe[0]) == "x" * 3 * SMALLEST + "\n"


def test_the_oldest_are_dropped_and_counted(pipe):
    stream, line = Output(pipe[1]), "y" * 1023
    for _ in range(KEPT_BYTES // 1024 + 100):
        stream.say(line)
    read = everything(stream, pipe[0])
    assert read.count("lines were not read; they are in the log") == 1
    assert len(read) < KEPT_BYTES + 2 * SMALLEST


def test_nobody_will_ever_read(pipe):
    stream = Output(os.dup(pipe[1]))
    os.close(stream._descriptor)
    stream.say("to nobody")
    stream.flush(10.0)


def test_a_stream_that_is_not_the_terminals(capsys):
    console.say("captured")
    assert capsys.readouterr().out == "captured\n"
