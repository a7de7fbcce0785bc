"""A run's folder: its files, and what happens to an earlier run's."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tf_dist import faults
from tf_dist.checkpoint.shards import point_to
from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import LaunchError
from tf_dist.ops.supervisor import with_run_dir
from tf_dist.run.plots import loss_curve
from tf_dist.run.run_folder import METRICS, RunFolder, choose_folder, point_latest_to, read_metrics


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


def folder_with(tmp_path, make):
    path = tmp_path / "gift"
    (path / "logs").mkdir(parents=True)
    make(path)
    return RunFolder(path, SerialComm())


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/rank-0000.log", "in-use.json"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    """Somebody sent the folder: what it leads to is a file of the user."""
    (tmp_path / "precious").write_text("do not lose")
    for make in (os.link, os.symlink):
        folder = folder_with(tmp_path, lambda path: make(tmp_path / "precious", path / name))  # noqa: B023
        with pytest.raises(LaunchError, match=r"it is a link|hard link"):
            folder.open()
            folder.log_metrics({"step": 1})
        assert (tmp_path / "precious").read_text() == "do not lose"
        shutil.rmtree(tmp_path / "gift")


@pytest.mark.parametrize(
    "name", ["status.json", "config.yaml", "loss.png", ".writable-0", "checkpoints/latest"]
)
def test_what_is_replaced_is_no_link_any_more(tmp_path, name):
    (tmp_path / "precious").write_text("do not lose")

    def make(path):
        (path / "checkpoints").mkdir()
        (path / name).symlink_to(tmp_path / "precious")

    folder = folder_with(tmp_path, make)
    folder.open()
    folder.status(step=1)
    folder.write("config.yaml", "a: 1\n")
    folder.log_metrics({"step": 1, "loss": 1.0})
    assert not loss_curve(folder.metrics, folder.path / "loss.png", "title")
    point_to(folder.checkpoints / "step-00000001", "latest")
    folder.failed(70, "boom")
    assert (tmp_path / "precious").read_text() == "do not lose"
    assert json.loads((folder.path / "status.json").read_text())["exit_code"] == 70


@pytest.mark.parametrize("name", ["logs", "checkpoints"])
def test_folders_of_a_run_lie_in_it(tmp_path, name):
    (tmp_path / "mine").mkdir()

    def make(path):
        (path / "logs").rmdir()
        (path / name).symlink_to(tmp_path / "mine")

    with pytest.raises(LaunchError, match=f"it is a link, not a folder .*{name}"):
        folder_with(tmp_path, make).open()
    assert not any((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json", "in-use.json", "logs/rank-0000.log"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    folder = folder_with(tmp_path, lambda path: os.mkfifo(path / name))
    if name == "status.json":
        folder.open()
        folder.failed(65, "no data")
        assert json.loads((folder.path / "status.json").read_text())["exit_code"] == 65
    else:
        with pytest.raises(LaunchError, match="it is a named pipe, not a regular file"):
            folder.open()


@pytest.mark.parametrize(
    "text", ["{}", "[]", "5", '{"failures": 3}', '{"failures": [], "a": ', "[" * 100_000, "\udcff"]
)
def test_a_status_of_somebody_else_hides_no_failure(run, text):
    (run.path / "status.json").write_text(text, errors="surrogateescape")
    run.failed(65, "error: no such file")
    status = json.loads((run.path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 65)
    assert [one["message"] for one in status["failures"]] == ["error: no such file"]


def test_jobs_that_begin_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    with ThreadPoolExecutor(8) as pool:
        for made in (
            lambda _: choose_folder(Config(), SerialComm()),
            lambda _: with_run_dir(["train.py"])[1],
        ):
            chosen = list(pool.map(made, range(40)))
            assert len(set(chosen)) == 40 and all(path.is_dir() for path in chosen)


def test_a_link_is_resolved_once(tmp_path, monkeypatch):
    """`runs/latest` may name another run a moment later, and never itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to("first")
    chosen = choose_folder(Config(run_dir="runs/latest"), SerialComm())
    assert str(chosen) == "runs/first"
    point_latest_to(tmp_path / "runs" / "latest")
    assert (tmp_path / "runs" / "latest").readlink().name == "first"
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == ["first", "latest"]


def test_what_is_said_is_escaped_on_the_terminal_and_in_the_log(run, capsys):
    run.say("sample \x1b[31m河")
    assert capsys.readouterr().out == "sample \\x1b[31m河\n"
    assert (run.path / "logs" / "rank-0000.log").read_text().endswith("sample \\x1b[31m河\n")
