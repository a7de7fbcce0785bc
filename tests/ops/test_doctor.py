"""What dead jobs have left, in a folder of our own; the processes are real ones."""

import os
import subprocess
import sys
import time

import pytest

from tf_dist.__main__ import main
from tf_dist.ops import doctor

LONG_AGO = time.time() - 10 * doctor.YOUNG_S
# Holds a file in the way that it is told, says so, and waits to be ended.
HOLDS = """
import mmap, os, sys
how, path = sys.argv[1:]
if how == "maps":
    file = open(path, "r+b")
    held = mmap.mmap(file.fileno(), 0)
    file.close()
elif how == "opens":
    held = open(path, "rb")
else:
    os.chdir(path)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def leave(tmp_path):
    """``leave(name, size)``: an old file, or with size 0 an old folder."""

    def make(name, size=4096):
        path = tmp_path / name
        if size:
            path.write_bytes(bytes(size))
        else:
            path.mkdir()
        os.utime(path, (LONG_AGO, LONG_AGO))
        return path

    return make


@pytest.fixture
def hold():
    """``hold(how, path)``: a process that maps or opens a file, or is in a folder."""
    started = []

    def start(how, path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, how, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.communicate()


@pytest.fixture
def dead():
    """The number of a process that is over."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(tmp_path):
    found, doubts = doctor.leftovers([tmp_path])
    assert not doubts
    return {one.path.name for one in found}


def test_what_dead_jobs_leave_is_found_and_removed(tmp_path, leave, dead):
    leave("sm_segment.vm.0.17f00000.0")
    leave("vader_segment.vm.0.17f00000.1")
    leave("osc_sm.vm.17f00000.0.10")
    leave(f"tf_dist-board-0-{dead}-823f044642dd22e3")
    leave(f"ompi.{dead}", size=0)
    (tmp_path / f"ompi.{dead}" / "hwloc.sm").write_bytes(bytes(1000))
    os.utime(tmp_path / f"ompi.{dead}", (LONG_AGO, LONG_AGO))
    others = [
        leave(name) for name in ("sm_segment", "ompi.x", "my.file", f"tf_dist-board-{dead}", "ompi.1.bak")
    ]
    lines, well = doctor.report([tmp_path], clean=False)
    assert well and lines[-1].startswith("5 leftovers of dead jobs") and "--clean" in lines[-1]
    assert len(list(tmp_path.iterdir())) == 10, "nothing is removed unless that is asked for"
    lines, well = doctor.report([tmp_path], clean=True)
    assert well and lines[-1].endswith("removed")
    assert sorted(tmp_path.iterdir()) == sorted(others)
    assert doctor.report([tmp_path], clean=True) == ([f"nothing of dead jobs in {tmp_path}"], True)


@pytest.mark.parametrize("how", ["maps", "opens"])
def test_files_of_a_living_job_stay(tmp_path, leave, hold, how):
    """Also those of its ranks that this process has nothing to do with."""
    mine = leave("sm_segment.vm.0.17f00000.0")
    leave("sm_segment.vm.0.17f00000.3")
    leave("osc_sm.vm.17f00000.0.10")
    leave("sm_segment.vm.0.28f00000.0")
    process = hold(how, mine)
    assert names(tmp_path) == {"sm_segment.vm.0.28f00000.0"}
    assert doctor.report([tmp_path], clean=True)[1]
    assert mine.exists() and len(list(tmp_path.iterdir())) == 3
    process.communicate()
    assert len(names(tmp_path)) == 3


def test_the_folder_of_a_living_launcher_stays(tmp_path, leave, hold, dead):
    leave(f"ompi.{os.getpid()}", size=0)
    leave(f"prte.vm.{os.getpid()}.0", size=0)
    leave(f"tf_dist-board-0-{os.getpid()}-00ff")
    inside = leave(f"ompi.{dead}", size=0)
    hold("is in", inside)
    assert names(tmp_path) == set()


def test_a_folder_of_another_host_stays(tmp_path, leave, dead):
    leave(f"ompi.{dead}", size=0)
    (tmp_path / f"ompi.{dead}" / "pmix.another.tool").touch()
    os.utime(tmp_path / f"ompi.{dead}", (LONG_AGO, LONG_AGO))
    assert names(tmp_path) == set()


def test_what_is_young_or_a_link_stays(tmp_path, leave):
    (tmp_path / "sm_segment.vm.0.17f00000.0").write_bytes(b"x")
    (tmp_path / "sm_segment.vm.0.18f00000.0").symlink_to(leave("target"))
    assert names(tmp_path) == set()


def test_a_python_that_may_not_be_looked_into_keeps_everything(tmp_path, leave, monkeypatch):
    leave("sm_segment.vm.0.17f00000.0")
    monkeypatch.setattr(doctor, "_shown", lambda process: (_ for _ in ()).throw(PermissionError()))
    lines, well = doctor.report([tmp_path], clean=True)
    assert not well and "may not be looked into" in lines[0]
    assert len(list(tmp_path.iterdir())) == 1


def test_it_is_a_question_of_the_command_line(tmp_path, leave, monkeypatch, capsys):
    leave("sm_segment.vm.0.17f00000.0")
    monkeypatch.setattr(doctor, "folders", lambda: [tmp_path])
    assert main(["doctor"]) == 0 and "1 leftover of" in capsys.readouterr().out
    assert main(["doctor", "--clean"]) == 0 and "removed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
