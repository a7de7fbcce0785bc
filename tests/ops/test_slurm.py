"""The Slurm script, with a launcher and a Slurm of our own: when it is queued again, and when not."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "train.sbatch"
JOB = """
if [ "$1" = wait ]; then trap 'sleep 0.2; exit 75' USR1; touch waiting; while true; do sleep 0.05; done; fi
if [ "$2" != python ]; then mkdir -p run/checkpoints/step-$2; fi
exit $1
"""
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def start(tmp_path):
    """``start(*ends)``: the script, whose job ends like that."""
    (tmp_path / "job.sh").write_text(JOB)
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    (tmp_path / "scontrol").chmod(0o755)

    def begin(*ends, flags=("--run-dir", "run")):
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "LAUNCH": " ".join(["bash", "job.sh", *ends]),
            "PYTHON": "python",
            "SLURM_JOB_ID": "17",
        }
        return subprocess.Popen(["bash", SCRIPT, *flags], cwd=tmp_path, env=environment)

    return begin


def requeued(tmp_path):
    path = tmp_path / "requeued"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("code", [0, 64, 65, 69, 76, 77, 78])
def test_what_is_over_is_not_queued_again(start, tmp_path, code):
    assert start(str(code)).wait(60) == code and requeued(tmp_path) == []


@pytest.mark.parametrize("code", [70, 71, 75, 137])
def test_what_can_go_on_is_queued_again(start, tmp_path, code):
    assert start(str(code)).wait(60) == 0 and requeued(tmp_path) == ["requeue 17"]


def test_two_failures_at_one_step_are_the_end(start, tmp_path):
    assert start("70", "00000020").wait(60) == 0
    assert start("70", "00000040").wait(60) == 0
    assert start("70").wait(60) == 70
    assert len(requeued(tmp_path)) == 2
    assert start("75").wait(60) == 0  # saved: that is no failure


def test_a_signal_saves_and_queues_again(start, tmp_path):
    job = start("wait")
    deadline = time.monotonic() + 60
    while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0 and requeued(tmp_path) == ["requeue 17"]


def test_without_a_folder_nothing_begins(start, tmp_path):
    assert start("0", flags=("--steps", "3")).wait(60) == 64
    assert start("0", flags=("--run-dir=run",)).wait(60) == 0
