"""One job at a time in a run folder; the other one is another process."""

import os
import subprocess
import sys

import pytest

from tf_dist.errors import LaunchError
from tf_dist.training import in_use

HOLD = "import sys, time; from pathlib import Path; from tf_dist.training.in_use import claim; claim(Path(sys.argv[1])); print('has it', flush=True); time.sleep(60)"  # noqa: E501


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"has it\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_named(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(in_use, "GOING_S", 0.1)
    with pytest.raises(
        LaunchError, match=f"in use by process {holder.pid} on .*, since 20.*--run-dir"
    ) as caught:
        in_use.claim(tmp_path)
    assert caught.value.exit_code == 78


def test_who_is_killed_has_it_no_more(holder, tmp_path):
    holder.kill()
    in_use.claim(tmp_path)
    assert f'"pid": {os.getpid()}' in (tmp_path / in_use.NAME).read_text()


def test_nobody_locks_himself_out(tmp_path):
    in_use.claim(tmp_path)
    in_use.claim(tmp_path)


def test_what_it_says_may_be_rubbish(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(in_use, "GOING_S", 0.1)
    (tmp_path / in_use.NAME).write_bytes(b"\xff[]")
    with pytest.raises(LaunchError, match="in use by another process"):
        in_use.claim(tmp_path)


def test_where_nothing_can_be_locked_it_is_said(tmp_path):
    with pytest.raises(LaunchError, match=r"cannot lock the run folder .*--run-dir"):
        in_use.claim(tmp_path / "not-there")


SHARE = "import os, sys, time; from pathlib import Path; from tf_dist.training import in_use; folder = Path(sys.argv[1])\nfirst = os.fork()\nif not first:\n    in_use.claim(folder)\n    print('first', os.getpid(), flush=True)\n    time.sleep(60)\nin_use.GOING_S = 20\ntime.sleep(float(sys.argv[2]))\nin_use.share(folder)\nprint('second', os.getpid(), flush=True)\ntime.sleep(60)"  # noqa: E501


def test_a_job_keeps_its_folder_when_its_first_rank_dies(tmp_path, monkeypatch):
    """Whoever waits for the folder gets it when the last rank is gone, and not before."""
    command = [sys.executable, "-c", SHARE, str(tmp_path), "0.5"]
    ranks = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        pids = dict(ranks.stdout.readline().split() for _ in range(2))
        os.kill(int(pids["first"]), 9)
        monkeypatch.setattr(in_use, "GOING_S", 0.2)
        with pytest.raises(LaunchError, match=f"in use by process {pids['first']}"):
            in_use.claim(tmp_path)
    finally:
        ranks.kill()
        ranks.communicate()
    in_use.claim(tmp_path)
    assert in_use.is_ours(tmp_path)


def test_a_lock_that_is_removed_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(in_use, "GOING_S", 0.1)
    (tmp_path / "checkpoints").mkdir()
    in_use.claim(tmp_path)
    (tmp_path / in_use.NAME).unlink()
    assert not in_use.is_ours(tmp_path)
    in_use.check(tmp_path)
    assert in_use.is_ours(tmp_path) and (tmp_path / in_use.NAME).exists()


def test_who_has_lost_the_lock_has_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(in_use, "GOING_S", 0.1)
    (tmp_path / "checkpoints").mkdir()
    in_use.claim(tmp_path)
    (tmp_path / in_use.NAME).unlink()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"has it\n"
        with pytest.raises(LaunchError, match=f"in use by process {other.pid}"):
            in_use.check(tmp_path)
        assert not in_use.is_ours(tmp_path)
    finally:
        other.kill()
        other.communicate()


def test_a_lock_is_not_a_file_of_somebody(tmp_path):
    (tmp_path / "precious").write_text("do not lose")
    for make in (os.link, os.symlink):
        make(tmp_path / "precious", tmp_path / in_use.NAME)
        with pytest.raises(LaunchError, match="cannot lock the run folder"):
            in_use.claim(tmp_path)
        (tmp_path / in_use.NAME).unlink()
    assert (tmp_path / "precious").read_text() == "do not lose"
