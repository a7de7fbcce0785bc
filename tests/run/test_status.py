"""What ``status.json`` says of jobs that ended without a word, and of those that are at work."""

import json
import os
import subprocess
import sys

import pytest

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import LaunchError
from tf_dist.run.run_folder import Foreword, RunFolder, check_folder
from tf_dist.run.status import correct


def status_of(folder):
    return json.loads((folder / "status.json").read_text())


def left_by(folder, state, code=None):
    folder.mkdir(exist_ok=True)
    status = {"state": state, "step": 7, "failures": [], "exit_code": code}
    (folder / "status.json").write_text(json.dumps(status))


@pytest.mark.parametrize(("state", "code", "found"), [("running", None, 137), ("stopping", 143, 143)])
def test_a_killed_job_has_failed(tmp_path, state, code, found):
    left_by(tmp_path, state, code)
    (tmp_path / "in-use.json").write_text("{}")
    correct(tmp_path)
    status = status_of(tmp_path)
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", found, 7)
    assert "from outside" in status["failures"][0]["message"]


@pytest.mark.parametrize("state", ["done", "saved", "failed"])
def test_what_was_said_stays(tmp_path, state):
    left_by(tmp_path, state, 75)
    before = (tmp_path / "status.json").read_bytes()
    correct(tmp_path)
    assert (tmp_path / "status.json").read_bytes() == before


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"state": 3}', '{"state": "running", "failures": 3}', "\0" * 100]
)
def test_what_is_no_status_is_left_alone(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    correct(tmp_path)
    assert (tmp_path / "status.json").read_text() == text


def test_a_link_is_not_followed(tmp_path):
    left_by(tmp_path / "theirs", "running")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").symlink_to(tmp_path / "theirs" / "status.json")
    correct(tmp_path / "run")
    assert status_of(tmp_path / "theirs")["state"] == "running"


AT_WORK = """
import sys
from pathlib import Path
from tf_dist.run.run_lock import claim
claim(Path(sys.argv[1]))
print("claimed", flush=True)
sys.stdin.read()
"""


def test_a_job_at_work_is_left_alone_and_corrected_when_it_is_killed(tmp_path):
    left_by(tmp_path, "running")
    words = [sys.executable, "-c", AT_WORK, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        try:
            assert job.stdout.readline() == "claimed\n"
            correct(tmp_path)
            assert status_of(tmp_path)["state"] == "running"
        finally:
            job.kill()
    correct(tmp_path)
    assert status_of(tmp_path)["state"] == "failed"


def test_the_next_start_corrects_what_it_finds(tmp_path):
    left_by(tmp_path / "run", "running")
    RunFolder(tmp_path / "run", SerialComm()).open()
    assert status_of(tmp_path / "run")["state"] == "failed"


def test_a_job_that_is_told_to_end_says_so_at_once(tmp_path):
    run = RunFolder(tmp_path / "run", SerialComm())
    run.open()
    run.status(step=3)
    run.stopping(143)
    run.status(step=4)  # what was saved meanwhile
    status = status_of(run.path)
    assert (status["state"], status["exit_code"], status["step"]) == ("stopping", 143, 4)
    run.status(state="saved", exit_code=75)
    run.stopping(143)
    assert (status_of(run.path)["state"], status_of(run.path)["exit_code"]) == ("saved", 75)


# Before there is a run ------------------------------------------------------------------------------


def test_nothing_is_written_before_all_is_known(tmp_path, capsys):
    foreword = Foreword(SerialComm())
    foreword.say("prepared")
    run = RunFolder(tmp_path / "run", SerialComm())
    assert not run.path.exists()
    run.open(foreword)
    foreword.say("trained")
    assert (run.path / "logs" / "rank-0000.log").read_text() == "prepared\ntrained\n"
    assert capsys.readouterr().out == "prepared\ntrained\n"


def test_a_folder_that_will_not_do_is_refused_early(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"the run folder .*file/run: .*is no folder.*--run-dir"):
        check_folder(Config(run_dir=str(tmp_path / "file" / "run")))
    check_folder(Config(run_dir=str(tmp_path / "new" / "run")))
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(LaunchError, match="permission"):
        check_folder(Config(run_dir=str(tmp_path / "new" / "run")))
