"""Nobody waits for ever: a rank that does not come is named, and nothing outlives the launcher."""

import json
import os
import signal
import time

import pytest
from launching import session_members

pytestmark = pytest.mark.cold

# What `docs/reliability.md` promises.
ORPHANS_S = 2.0
# `tf-dist train`, with a rank that takes its time before each step.
SLOW = """
import os, sys, time

from tf_dist.cli import train as script
from tf_dist.comm.runtime.launch import launched_rank

train = script.train

def slow(*arguments):
    from tf_dist.run import run_callbacks

    begin = run_callbacks.LogRun.on_train_batch_begin

    def later(self, batch, logs=None):
        time.sleep(0.1 * (launched_rank(os.environ) == 2))
        begin(self, batch, logs)

    run_callbacks.LogRun.on_train_batch_begin = later
    train(*arguments)

script.train = slow
script.main(sys.argv[1:])
"""
# Ranks that have nothing to do with MPI for the moment: it cannot tell them that the launcher is gone.
ASLEEP = """
import time
from tf_dist.comm.runtime import launch

comm = launch.join()
comm.barrier()
print(f"READY {comm.rank}", flush=True)
time.sleep(1000)
"""


def test_a_slow_rank_and_a_stopped_one_are_named(start_job, small, tmp_path):
    """The first one in the status as well; the second is no obstacle to the end of the job."""
    (tmp_path / "slow.py").write_text(SLOW)
    flags = ["--steps", "100000", "--save-every", "10", "--stall-warn", "2", "--stall-abort", "5"]
    run = tmp_path / "run"
    job = start_job(3, tmp_path / "slow.py", *small, *flags, "--run-dir", run)

    def status():
        return json.loads((run / "status.json").read_text())

    job.wait_until(lambda: (run / "status.json").exists() and status().get("stragglers"))
    (slow,) = status()["stragglers"]
    assert slow["rank"] == 2 and slow["ratio"] > 1.5 and slow["ms"] > 50
    pid, before = job.pid_of_rank(1), len(job.output())
    os.kill(pid, signal.SIGSTOP)
    ended = job.wait(60)
    assert ended.code == 70, ended.output
    assert ended.output.count("rank 2 (pid") == 1 and "is slow: it takes" in ended.output
    # On a busy machine ranks that still load TensorFlow are named as well, before.
    since = ended.output[before:]
    lines = [line for line in since.splitlines() if f"rank 1 (pid {pid} on " in line]
    said = f"it is stopped (SIGSTOP). kill -CONT {pid} lets it go on"
    assert lines and all("has not come to" in line and " of step " in line and said in line for line in lines)
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    assert "error: " not in ended.output.replace(lines[-1], "")
    (failure,) = status()["failures"]
    assert f"rank 1 (pid {pid}" in failure["message"] and status()["exit_code"] == 70
    assert said in "".join(log.read_text() for log in (run / "logs").glob("rank-*.log"))
    for rank in (0, 2):
        # In a step, or in what is between steps: a save.
        assert " in fit\n" in (run / "logs" / f"stacks-rank-{rank:04d}.txt").read_text()


def test_no_rank_outlives_mpirun(start_job, tmp_path):
    """One of them is stopped, and cannot even try."""
    (tmp_path / "asleep.py").write_text(ASLEEP)
    job = start_job(3, tmp_path / "asleep.py")
    job.wait_until(lambda: job.output().count("READY") == 3)
    os.kill(job.pid_of_rank(1), signal.SIGSTOP)
    os.kill(job.pid, signal.SIGKILL)
    deadline = time.monotonic() + ORPHANS_S
    while session_members(job.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not session_members(job.pid)
    assert job.wait().code == -signal.SIGKILL
