"""One job at a time in a run folder; the other one is another process."""

import os
import subprocess
import sys

import pytest

from tf_dist.errors import LaunchError
from tf_dist.run import run_lock

HOLD = "import sys, time; from pathlib import Path; from tf_dist.run.run_lock import claim; claim(Path(sys.argv[1])); print('has it', flush=True); time.sleep(60)"  # noqa: E501


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"has it\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_named(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "GOING_S", 0.1)
    with pytest.raises(
        LaunchError, match=f"in use by process {holder.pid} on .*, since 20.*--run-dir"
    ) as caught:
        run_lock.claim(tmp_path)
    assert caught.value.exit_code == 78


def test_who_is_killed_has_it_no_more(holder, tmp_path):
    holder.kill()
    run_lock.claim(tmp_path)
    assert f'"pid": {os.getpid()}' in (tmp_path / run_lock.NAME).read_text()


def test_nobody_locks_himself_out(tmp_path):
    run_lock.claim(tmp_path)
    run_lock.claim(tmp_path)


def test_what_it_says_may_be_rubbish(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "GOING_S", 0.1)
    (tmp_path / run_lock.NAME).write_bytes(b"\xff[]")
    with pytest.raises(LaunchError, match="in use by another process"):
        run_lock.claim(tmp_path)


def test_where_nothing_can_be_locked_it_is_said(tmp_path):
    with pytest.raises(LaunchError, match=r"cannot lock the run folder .*--run-dir"):
        run_lock.claim(tmp_path / "not-there")


SHARE = "import os, sys, time; from pathlib import Path; from tf_dist.run import run_lock; folder = Path(sys.argv[1])\nfirst = os.fork()\nif not first:\n    run_lock.claim(folder)\n    print('first', os.getpid(), flush=True)\n    time.sleep(60)\nrun_lock.GOING_S = 20\ntime.sleep(float(sys.argv[2]))\nrun_lock.share(folder)\nprint('second', os.getpid(), flush=True)\ntime.sleep(60)"  # noqa: E501


def test_a_job_keeps_its_folder_when_its_first_rank_dies(tmp_path, monkeypatch):
    """Whoever waits for the folder gets it when the last rank is gone, and not before."""
    command = [sys.executable, "-c", SHARE, str(tmp_path), "0.5"]
    ranks = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        pids = dict(ranks.stdout.readline().split() for _ in range(2))
        os.kill(int(pids["first"]), 9)
        monkeypatch.setattr(run_lock, "GOING_S", 0.2)
        with pytest.raises(LaunchError, match=f"in use by process {pids['first']}"):
            run_lock.claim(tmp_path)
    finally:
        ranks.kill()
        ranks.communicate()
    run_lock.claim(tmp_path)
    assert run_lock.is_ours(tmp_path)


def test_a_lock_that_is_removed_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "GOING_S", 0.1)
    (tmp_path / "checkpoints").mkdir()
    run_lock.claim(tmp_path)
    (tmp_path / run_lock.NAME).unlink()
    assert not run_lock.is_ours(tmp_path)
    run_lock.check(tmp_path)
    assert run_lock.is_ours(tmp_path) and (tmp_path / run_lock.NAME).exists()


def test_who_has_lost_the_lock_has_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "GOING_S", 0.1)
    (tmp_path / "checkpoints").mkdir()
    run_lock.claim(tmp_path)
    (tmp_path / run_lock.NAME).unlink()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"has it\n"
        with pytest.raises(LaunchError, match=f"in use by process {other.pid}"):
            run_lock.check(tmp_path)
        assert not run_lock.is_ours(tmp_path)
    finally:
        other.kill()
        other.communicate()


def test_a_lock_is_not_a_file_of_somebody(tmp_path):
    (tmp_path / "precious").write_text("do not lose")
    for make in (os.link, os.symlink):
        make(tmp_path / "precious", tmp_path / run_lock.NAME)
        with pytest.raises(LaunchError, match="cannot lock the run folder"):
            run_lock.claim(tmp_path)
        (tmp_path / run_lock.NAME).unlink()
    assert (tmp_path / "precious").read_text() == "do not lose"
