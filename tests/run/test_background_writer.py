"""Work in a thread: in order, waited for when asked to, and its errors are not lost."""

import threading
import time

import pytest

from tf_dist.comm.transport.base import SerialComm
from tf_dist.run.background_writer import Background
from tf_dist.run.run_folder import RunFolder, read_metrics


def test_in_order_and_nobody_waits():
    later, gate, done = Background(), threading.Event(), []
    later(lambda: gate.wait(10) and done.append(0))
    for number in range(1, 5):
        later(lambda number=number: done.append(number))
    assert done == []
    gate.set()
    later.drain()
    assert done == [0, 1, 2, 3, 4]


def test_an_error_is_raised_once_and_work_goes_on():
    later, done = Background(), []

    def full():
        raise OSError("no space left on device")

    later(full)
    with pytest.raises(OSError, match="no space left"):
        later.drain()
    later(lambda: done.append(1))
    later.drain()
    assert done == [1]


def test_draining_from_inside_does_not_wait_for_itself():
    later, done = Background(), []
    later(lambda: (later.drain(), done.append(1)))
    later.drain()
    assert done == [1]


def test_a_disk_that_hangs_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr("tf_dist.run.background_writer.DRAIN_LIMIT_S", 0.05)
    later, gate = Background(), threading.Event()
    later(lambda: gate.wait(10))
    later.drain()
    assert not gate.is_set()
    gate.set()


def test_what_a_run_says_comes_after_the_rows_before_it(tmp_path, capsys):
    run = RunFolder(tmp_path / "run", SerialComm())
    run.open()
    for step in range(3):
        run.later(
            lambda step=step: (time.sleep(0.02), run.log_metrics({"step": step}), run.say(f"row {step}"))
        )
    run.say("the end")
    assert capsys.readouterr().out.split("\n")[:4] == ["row 0", "row 1", "row 2", "the end"]
    assert [row["step"] for row in read_metrics(run.metrics)] == [0, 1, 2]


def test_a_failure_is_noted_after_all_rows(tmp_path):
    run = RunFolder(tmp_path / "run", SerialComm())
    run.open()
    run.later(lambda: (time.sleep(0.05), run.log_metrics({"step": 1})))
    run.failed(70, "ValueError: boom")
    assert [row["step"] for row in read_metrics(run.metrics)] == [1]
