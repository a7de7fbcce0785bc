"""`python -m tf_dist run`: a rank is killed, and the job comes to the end that it would have had."""

import json
import os
import signal
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"


def test_a_killed_job_is_started_again(launcher, first_run, tmp_path):
    path = tmp_path / "run"
    job = ["-np", "2", "--", TRAIN, *first_run.flags, "--run-dir", path]
    job = launcher.start(0, "-m", "tf_dist", "run", *job, cwd=tmp_path)
    metrics = path / "metrics.jsonl"
    job.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 22)
    os.kill(job.pid_of_rank(1), signal.SIGKILL)
    ended = job.wait()
    assert ended.code == 0, ended.output
    assert "tf_dist run: the job has ended with" in ended.output and "from step 20" in ended.output
    assert "resumed at step 20" in ended.output
    status = json.loads((path / "status.json").read_text())
    assert status["weights_sha256"] == first_run.status["weights_sha256"]


def test_a_mistake_is_said_once(launcher, tmp_path):
    ended = launcher.start(
        0, "-m", "tf_dist", "run", "-np", "2", "--", TRAIN, "--no-such-flag", cwd=tmp_path
    ).wait()
    assert ended.code == 64 and ended.output.count("error:") == 1, ended.output
    assert "tf_dist run" not in ended.output
