"""Processes that are told to end, and interpreters to which a person types."""

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import threading, time
from tf_dist.comm.runtime import launch
signals = launch.handle_stop_signals()
stop = threading.Event()
def finish(name):
    print("finishing on", name, flush=True)
    stop.set()
{middle}
print("ready", flush=True)
{end}
"""
FINISHES = "signals.finish(finish)"
# The main thread is not in Python; a signal ends the first sleep.
IN_C = "import ctypes; sleep = ctypes.CDLL(None).sleep; sleep(100), sleep(100)"
SAVES = "stop.wait(60); raise SystemExit(75)"
STUCK = "time.sleep(100)"


def told(program, *signals):
    words, both = [sys.executable, "-c", program], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(words, text=True, **both) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            for number in signals:
                process.send_signal(number)
                time.sleep(0.7)
            said = process.stdout.read()
            return process.wait(60), said
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_signal_saves(number):
    code, said = told(PROGRAM.format(middle=FINISHES, end=SAVES), number)
    assert (code, said) == (75, f"finishing on {number.name}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_one_ends(number):
    code, said = told(PROGRAM.format(middle=FINISHES, end=STUCK), number, number)
    assert code == 128 + number
    assert said.count("finishing") == 1 and f"told to end again ({number.name}): not saved" in said


def test_a_job_system_may_say_it_twice():
    end = "stop.wait(60); time.sleep(2); raise SystemExit(75)"
    code, said = told(PROGRAM.format(middle=FINISHES, end=end), signal.SIGUSR1, signal.SIGUSR1)
    assert (code, said.count("finishing")) == (75, 1)


def test_before_there_is_anything_to_save_it_ends_at_once_whatever_the_main_thread_does():
    code, said = told(PROGRAM.format(middle="", end=IN_C), signal.SIGTERM)
    assert code == 75 and "told to end (SIGTERM) before the first step" in said


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_what_was_ignored_stays_ignored(ignored):
    program = PROGRAM.format(middle=FINISHES, end="time.sleep(1.5); raise SystemExit(0)")
    program = f"import signal; signal.signal({int(ignored)}, signal.SIG_IGN)\n{program}"
    assert told(program, ignored) == (0, "")


# Interpreters to which a person types ---------------------------------------------------------------


def test_a_typo_ends_no_interactive_interpreter():
    typed = (
        "1/0\nimport threading\nt = threading.Thread(target=lambda: [].pop()); t.start(); t.join()\n"
        "print('still here')\n"
    )
    program = [sys.executable, "-i", "-c", "from tf_dist.comm.runtime import launch; launch.join()"]
    ended = subprocess.run(program, input=typed, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and ended.stdout == "still here\n"
    assert "ZeroDivisionError" in ended.stderr and "IndexError" in ended.stderr


def test_a_thread_may_end_itself():
    program = (
        "import sys, threading; from tf_dist.comm.runtime import launch; launch.join()\n"
        "thread = threading.Thread(target=lambda: sys.exit(3)); thread.start(); thread.join(); print('here')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("here\n", "")


@pytest.mark.parametrize("closed", ["1", "2"])
def test_streams_may_be_closed(closed):
    child = "from tf_dist.comm.runtime import launch; print(launch.join().size)"
    program = f"{sys.executable} -c '{child}' {closed}>&-"
    assert subprocess.run(["bash", "-c", program], timeout=60, env=dict(os.environ)).returncode in (0, 120)


def test_mpi_that_somebody_else_has_begun():
    program = (
        "from mpi4py import MPI; assert MPI.Is_initialized(); "
        "from tf_dist.comm.runtime import launch as l; l.join()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
