"""Trainings that are told to end: by whom they were started decides what is saved, and what is said of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cold

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"


def status_of(path):
    return json.loads((path / "status.json").read_text())


@pytest.fixture
def endless(small, tmp_path):
    """Flags of a run that saves its fifth step, and goes on."""
    return [
        *small,
        "--steps",
        "100000",
        "--save-every",
        "5",
        "--log-every",
        "1",
        "--run-dir",
        tmp_path / "run",
    ]


def trains(path):
    return lambda: any(path.glob("checkpoints/step-*/manifest.json"))


@pytest.mark.parametrize("by", ["itself", "run"])
def test_who_has_the_time_saves(start_job, endless, tmp_path, by):
    """A process by itself, told by Ctrl-C; a job of `python -m tf_dist run`, by SIGTERM."""
    run = tmp_path / "run"
    words = (
        (TRAIN, *endless) if by == "itself" else ("-m", "tf_dist", "run", "-np", "2", "--", TRAIN, *endless)
    )
    job = start_job(0, *words)
    job.wait_until(trains(run))
    os.kill(job.pid, signal.SIGINT if by == "itself" else signal.SIGTERM)
    ended = job.wait()
    assert ended.code == 75, ended.output
    status = status_of(run)
    assert (status["state"], status["exit_code"], status["failures"]) == ("saved", 75, [])
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()
    assert f"error: saved at step {status['step']} of" in ended.output and "Traceback" not in ended.output
    assert ended.output.count("told to end (SIG") == 1


def test_mpirun_leaves_no_time_and_what_is_saved_is_said(start_job, endless, tmp_path):
    run = tmp_path / "run"
    job = start_job(2, TRAIN, *endless)
    job.wait_until(trains(run))
    os.kill(job.pid, signal.SIGTERM)
    ended = job.wait()
    assert ended.code != 0
    assert status_of(run)["state"] in ("stopping", "saved")
    assert "told to end (SIGTERM): " in ended.output and "kill -USR1" in ended.output
    show = [sys.executable, "-m", "tf_dist", "checkpoint", "show", str(run)]
    subprocess.run(show, check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert status_of(run)["state"] in ("failed", "saved")


def test_nobody_reads_the_output(small, launcher, tmp_path):
    """A pipe that is full: a process by itself trains to its end, and every line is in its log."""
    run, (reading, writing) = tmp_path / "run", os.pipe()
    words = [*small, "--steps", "600", "--log-every", "1", "--eval-every", "0", "--run-dir", run]
    command = [sys.executable, TRAIN, *map(str, words)]
    environment = {**launcher._environment}
    try:
        subprocess.run(command, cwd=tmp_path, env=environment, stdout=writing, check=True, timeout=240)
    finally:
        os.close(writing)
        os.close(reading)
    assert status_of(run)["state"] == "done"
    lines = (run / "logs" / "rank-0000.log").read_text().splitlines()
    assert sum(line.startswith("step ") for line in lines) == 600
    assert sum(map(len, lines)) > 65536  # more than a pipe takes
