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
