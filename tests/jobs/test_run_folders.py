"""A run folder belongs to one job: it cannot be taken from one, nor be written to when it is gone."""

import json
import os
import shutil
import signal

import pytest

ULFM = ("--with-ft", "ulfm")


def steps_of(path):
    if not (path / "metrics.jsonl").exists():
        return []
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.cold
def test_whoever_waits_for_a_folder_does_not_get_it_from_the_dead(start_job, small, tmp_path):
    """The first rank, which has made the lock, is killed while another job waits; the others go on."""
    path = tmp_path / "run"
    flags = [*small, "--autotune", "off", "--save-every", "20", "--run-dir", path]
    first = start_job(2, ULFM, "train.py", *flags, "--steps", "100000", "--threads-per-rank", "1")
    first.wait_until(lambda: len(steps_of(path)) >= 10)
    second = start_job(0, "train.py", *flags, "--steps", "100000")

    def waits():
        handles = [f"/proc/{second.pid}/fd/{one}" for one in os.listdir(f"/proc/{second.pid}/fd")]
        return any(os.path.realpath(one) == str(path / "in-use.json") for one in handles)

    second.wait_until(waits)
    os.kill(first.pid_of_rank(0), signal.SIGKILL)
    ended = second.wait()
    assert ended.code == 78, ended.output
    assert "is in use by process" in ended.output
    # The first goes on alone, and says who speaks for it now.
    before = len(steps_of(path))
    first.wait_until(lambda: len(steps_of(path)) > before + 5)
    assert json.loads((path / "in-use.json").read_text())["pid"] == first.pid_of_rank(1)
    found = steps_of(path)  # once: the job goes on
    assert found == list(range(1, len(found) + 1))
    first.kill()


def test_a_folder_that_is_removed_under_a_job(start_job, small, tmp_path):
    """Said once, by the first rank; the other one does not wait for it."""
    path = tmp_path / "run"
    job = start_job(2, "train.py", *small, "--autotune", "off", "--steps", "100000", "--run-dir", path)
    job.wait_until(lambda: len(steps_of(path)) >= 5)
    path.rename(tmp_path / "elsewhere")
    ended = job.wait()
    assert ended.code == 78, ended.output
    assert ended.output.count("is gone: somebody has removed or renamed it") == 1, ended.output
    assert "Traceback" not in ended.output and not path.exists()
    shutil.rmtree(tmp_path / "elsewhere")
