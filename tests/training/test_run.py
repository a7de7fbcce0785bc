"""A run's folder: its files, and what happens to an earlier run's."""

import json

import pytest

from tf_dist import faults
from tf_dist.comm.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import LaunchError
from tf_dist.training.run import METRICS, RunFolder, choose_folder, point_latest_to, read_metrics


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run", SerialComm())
    folder.open()
    return folder


def test_every_line_of_metrics_has_every_key(run):
    run.log_metrics({"step": 1, "loss": 2.0})
    (row,) = read_metrics(run.metrics)
    assert set(row) == set(METRICS)
    assert row["step"] == 1 and row["val_loss"] is None


def test_a_half_written_line_is_passed_over(run):
    run.log_metrics({"step": 1})
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(run.metrics)] == [1]


def test_a_full_disk_is_one_clear_error(run):
    run.log_metrics({"step": 1})
    before = run.metrics.read_text()
    faults.arm("diskfull:step=2", 0)
    try:
        faults.writes_below(run.path)
        faults.begin(2, [])
        with pytest.raises(LaunchError, match=r"metrics.jsonl: No space left on device. .*Make room"):
            run.log_metrics({"step": 2})
    finally:
        faults.arm("", 0)
    assert run.metrics.read_text() == before
    run.log_metrics({"step": 2})
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2]


def test_what_is_no_number_is_null(run):
    run.log_metrics({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    (row,) = [json.loads(line, parse_constant=pytest.fail) for line in run.metrics.read_text().splitlines()]
    assert (row["step"], row["loss"], row["grad_norm"]) == (1, None, None)


def test_lines_of_steps_taken_again_are_dropped(run):
    for step in (1, 2, 3):
        run.log_metrics({"step": step})
    run.drop_metrics_after(2)
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2]


def test_failures_are_noted_whoever_fails(run):
    run.status(step=3)
    run.failed(70, "Traceback ...\nValueError: boom\n")
    status = json.loads((run.path / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 70, 3)
    assert status["failures"][0]["message"] == "ValueError: boom"


def test_starting_anew_moves_the_earlier_run_aside(run):
    run.set_aside()  # nothing there yet
    assert not (run.path / "earlier-1").exists()
    for number in (1, 2):
        (run.checkpoints / f"step-{number:08d}").mkdir()
        run.log_metrics({"step": number})
        run.set_aside()
        assert (run.path / f"earlier-{number}" / "checkpoints" / f"step-{number:08d}").is_dir()
        assert (run.path / f"earlier-{number}" / "metrics.jsonl").exists()
    assert not any(run.checkpoints.iterdir()) and not run.metrics.exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match="--run-dir"):
        RunFolder(tmp_path / "file" / "run", SerialComm()).open()


def test_new_folders_never_meet_an_old_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    first = choose_folder(Config(), SerialComm())
    assert first.is_dir()  # at once: another job may begin in the same second
    second = choose_folder(Config(), SerialComm())
    assert (first.name, second.name) == ("now-transformer", "now-transformer-2")
    point_latest_to(first)
    assert (tmp_path / "runs" / "latest").resolve().name == "now-transformer"
