"""The watchdogs of several ranks on one board, in one process: without threads, with a clock of ours."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from tf_dist import processes
from tf_dist.comm.health import watchdog
from tf_dist.comm.health.hang_detector import AT_THE_END, Limits
from tf_dist.comm.health.status_board import Heartbeat, StatusBoard, bytes_needed, place_of, private_board
from tf_dist.comm.health.watchdog import FLOOR_S, GAP_S, WRITING_S, Watchdog
from tf_dist.comm.transport.base import SerialComm


class Voice:
    """An `JobExit` that only takes note."""

    def __init__(self):
        self.said, self.ended, self.apart = [], [], set()

    def members(self):
        return self.apart

    def speak(self, text):
        self.said.append(text)

    def end(self, text):
        self.ended.append(text)


class OneOf(SerialComm):
    """A Comm of several ranks, of which nothing but its record is of interest."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size
        self.origin = list(range(size))


class Ranks:
    """Watchdogs that beat when they are told."""

    def __init__(self, size, clock, folder=None, limits=Limits(10.0, 40.0)):  # noqa: B008 - immutable
        self.board, self.clock, self.size = private_board(size), clock, size
        self.voices = [Voice() for _ in range(size)]
        self.dogs = [Watchdog(self.board, r, list(range(size)), self.voices[r]) for r in range(size)]
        for rank, dog in enumerate(self.dogs):
            dog.comm, dog.limits, dog.folder = OneOf(rank, size), limits, folder
        self.beat()

    def beat(self, *silent):
        for rank, dog in enumerate(self.dogs):
            if rank not in silent:
                dog.beat()

    def later(self, seconds, *silent):
        for _ in range(round(2 * seconds)):
            self.clock[0] += 0.5
            self.beat(*silent)

    def wait_in(self, verb, *ranks):
        for rank in ranks:
            self.dogs[rank].comm.record.waiting = (verb, self.clock[0]) if verb else None

    def said(self):
        return [text for voice in self.voices for text in voice.said]

    def ended(self):
        return [(rank, text) for rank, voice in enumerate(self.voices) for text in voice.ended]


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.process_time", lambda: now[0] / 2)  # half a core is in use
    return now


@pytest.fixture
def child():
    """A process that sleeps, ours to stop and to kill."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield process
    process.kill()
    process.wait()


def is_rank(ranks, rank, process):
    """Let a rank be another process, which beats no more."""
    ranks.board.slots["pid"][rank] = process.pid
    ranks.board.slots["started"][rank] = processes.find(process.pid).started


def wait_for_state(process, letters):
    while processes.state_of(process.pid, 0) not in letters:
        pass


def test_nothing_is_said_while_ranks_come(clock):
    ranks = Ranks(3, clock)
    for _ in range(20):
        ranks.wait_in("allreduce", 0, 1, 2)
        ranks.later(9)
        ranks.wait_in("", 0, 1, 2)
        ranks.later(1)
    assert not ranks.said() and not ranks.ended()


def test_one_voice_names_the_one_that_works_and_the_job_ends(clock, tmp_path):
    """Warned at the limit and at its doubles; all write their stacks; the lowest that waits ends the job."""
    ranks = Ranks(3, clock, tmp_path)
    for dog in ranks.dogs:
        dog.comm.record.begin_step(7)
        dog.comm.record.end_step(1)
    ranks.wait_in("allreduce", 1, 2)
    ranks.later(12)
    (line,) = ranks.voices[1].said
    assert "rank 0" in line and "allreduce of step 7 for 10 s: it is at work (50 % of a core)" in line
    assert "The job ends after 40 s" in line
    ranks.later(26)
    assert len(ranks.said()) == 2 and not ranks.ended()
    ranks.later(2 + WRITING_S)
    ((rank, why),) = ranks.ended()
    assert rank == 1 and "rank 0" in why and "--stall-abort" in why
    for number in range(3):
        text = (tmp_path / f"stacks-rank-{number:04d}.txt").read_text()
        assert text.count(f", pid {os.getpid()}") == 3 and "test_watchdog.py" in text
    assert "has not come to allreduce" in (tmp_path / "rank-0001.log").read_text()


def test_ranks_that_train_something_else_are_not_missed(clock):
    """A script has divided the ranks in two: those of one part wait for each other alone."""
    ranks = Ranks(4, clock)
    for rank, voice in enumerate(ranks.voices):
        voice.apart = {0, 2} if rank in (0, 2) else {1, 3}
        ranks.dogs[rank].comm.record.begin_step(1)
        ranks.dogs[rank].comm.record.end_step(1)
    ranks.wait_in(AT_THE_END, 1, 3)
    ranks.later(60)
    assert not ranks.said() and not ranks.ended()
    ranks.wait_in("allreduce", 2)
    ranks.later(11)
    (line,) = ranks.said()
    assert "rank 0" in line and "rank 1" not in line and "rank 3" not in line


def test_others_end_the_job_where_the_first_does_not(clock):
    ranks = Ranks(3, clock)
    ranks.wait_in("allreduce", 1, 2)
    ranks.dogs[0].comm.record.begin_step(1)
    ranks.dogs[0].comm.record.end_step(1)
    ranks.later(43 + FLOOR_S)
    assert {rank for rank, _ in ranks.ended()} == {1, 2}


def test_who_compiles_is_warned_about_and_given_time(clock):
    ranks = Ranks(2, clock)
    ranks.wait_in("broadcast", 1)
    ranks.later(500)
    assert not ranks.ended()
    # At 10 s, 20, 40, ..., 320.
    assert len(ranks.said()) == 6 and all("It is given time" in line for line in ranks.said())


def test_a_warning_is_taken_back(clock):
    ranks = Ranks(2, clock)
    ranks.wait_in("broadcast", 1)
    ranks.later(15)
    ranks.wait_in("", 1)
    ranks.later(3)
    assert len(ranks.said()) == 2 and ranks.said()[1].startswith("the ranks go on")


def test_zero_is_never(clock):
    ranks = Ranks(2, clock, limits=Limits(0.0, 0.0))
    ranks.wait_in("allreduce", 1)
    ranks.later(1000)
    assert not ranks.said() and not ranks.ended()


def test_a_stopped_process_is_told_from_a_dead_one(clock, child):
    ranks = Ranks(2, clock)
    ranks.wait_in("allreduce", 1)
    is_rank(ranks, 0, child)
    child.send_signal(signal.SIGSTOP)
    wait_for_state(child, "T")
    ranks.later(11, 0)
    assert f"it is stopped (SIGSTOP). kill -CONT {child.pid}" in ranks.said()[0]
    child.kill()
    wait_for_state(child, "Z")
    ranks.later(20, 0)
    assert "it is dead" in ranks.said()[-1]


def test_nobody_speaks_of_who_has_just_died(clock, child):
    """mpirun ends the job, or MPI tells the others: that is their story."""
    ranks = Ranks(2, clock)
    ranks.wait_in("allreduce", 1)
    is_rank(ranks, 0, child)
    ranks.later(9, 0)
    child.kill()
    wait_for_state(child, "Z")
    ranks.later(FLOOR_S, 0)
    assert not ranks.said()


def test_where_the_others_can_go_on_the_culprit_is_killed(clock, child):
    ranks = Ranks(3, clock)
    for dog in ranks.dogs:
        dog.may_kill = True
    ranks.wait_in("allreduce", 1, 2)
    is_rank(ranks, 0, child)
    child.send_signal(signal.SIGSTOP)
    wait_for_state(child, "T")
    ranks.later(41 + WRITING_S, 0)
    assert child.wait(10) == -signal.SIGKILL
    assert not ranks.ended()
    assert "Killed, so that the others can go on" in ranks.voices[1].said[-1]
    assert not ranks.voices[2].said


def test_ranks_that_have_died_before_are_not_missed(clock, child):
    ranks = Ranks(3, clock)
    is_rank(ranks, 0, child)
    child.kill()
    wait_for_state(child, "Z")
    for dog in ranks.dogs[1:]:
        dog.comm.origin = [1, 2]
    ranks.wait_in("allreduce", 2)
    ranks.later(11, 0)
    assert len(ranks.said()) == 1 and "rank 1" in ranks.said()[0]


def test_a_job_that_was_stopped_as_a_whole_begins_to_wait_anew(clock):
    """Or a laptop that was closed: nobody is missing only because time has passed."""
    ranks = Ranks(2, clock)
    ranks.wait_in("allreduce", 1)
    ranks.later(1)
    clock[0] += 3600.0 + GAP_S
    ranks.later(9)
    assert not ranks.said() and not ranks.ended()
    ranks.later(3)
    assert "for 10 s" in ranks.said()[0]


def test_a_straggler_is_named_once(clock):
    ranks = Ranks(2, clock)
    for step in range(1, 41):
        for rank, dog in enumerate(ranks.dogs):
            dog.comm.record.begin_step(step)
            dog.comm.record.comm_s += 0.0 if rank else 0.3  # rank 0 waits for the other one
        clock[0] += 0.5
        for dog in ranks.dogs:
            dog.comm.record.end_step(2)
        ranks.beat()
        assert ranks.said() or step < 20
    assert len(ranks.said()) == 1
    assert "rank 1" in ranks.said()[0] and "2.5 times as long" in ranks.said()[0]
    assert ranks.dogs[0].stragglers[1].ms == pytest.approx(300.0)


def test_nobody_outlives_the_launcher(clock, child):
    ranks = Ranks(2, clock)
    ranks.dogs[0]._launcher = processes.find(child.pid)
    ranks.later(1)
    assert not ranks.ended()
    child.kill()
    wait_for_state(child, "Z")
    ranks.beat()
    ((_, why),) = ranks.ended()
    assert f"(pid {child.pid}), which started this rank, is gone" in why


def test_without_a_launcher_nothing_is_watched():
    assert processes.launcher_above(os.getpid()) is None


def test_the_kernel_ends_who_has_lost_its_parent(tmp_path):
    """Also where it is stopped, and cannot see to it itself."""
    script = (
        "import os, signal, subprocess, sys, time\n"
        "from tf_dist.comm.health.watchdog import die_with_parent\n"
        "parent = os.getpid()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    die_with_parent(parent)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "os.waitpid(pid, os.WUNTRACED)\n"
        "print(pid, flush=True)\n"
        "os._exit(0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    deadline = threading.Event()
    for _ in range(500):
        if processes.state_of(int(ended.stdout), 0) in ("", "Z"):
            return
        deadline.wait(0.01)
    pytest.fail("it lives on")


def test_a_board_is_what_was_written():
    memory = bytearray(bytes_needed(3))
    here, there = StatusBoard(memory, 3), StatusBoard(memory, 3)
    comm = OneOf(1, 3)
    comm.record.waiting = ("allreduce", 12.5)
    comm.record.begin_step(5)
    pulse = Heartbeat(here, 1, threading.get_ident())
    pulse.beat(comm.record)
    slot = there.slots[1]
    assert (slot["pid"], slot["verb"], slot["since"], slot["step"]) == (os.getpid(), b"allreduce", 12.5, 5)
    assert slot["where"] == b"" and slot["beats"] == 1 and not there.slots["pid"][[0, 2]].any()
    comm.record.waiting = None
    pulse.beat(comm.record)
    assert slot["verb"] == b"" and slot["since"] == 0 and b"status_board.py" in slot["where"]
    assert there.stacks_requested == 0
    here.request_stacks(2)
    here.request_stacks(1)
    assert there.stacks_requested == 2


def test_a_place_is_the_users_line():
    frame = sys._getframe()
    assert place_of(frame).endswith(f"test_watchdog.py:{frame.f_lineno}, in test_a_place_is_the_users_line")
    assert place_of(None) == ""


def test_watchdogs_end_with_the_job():
    dog = Watchdog(private_board(1), 0, [0], Voice())
    dog.start()
    assert any(thread.name == "tf_dist-watchdog" for thread in threading.enumerate())
    dog.stop()
    assert not any(thread.name == "tf_dist-watchdog" for thread in threading.enumerate())
    assert watchdog.BEAT_S < 1
