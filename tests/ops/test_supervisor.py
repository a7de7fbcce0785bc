"""Jobs that are started again: a launcher of our own counts them, and a job that says how it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tf_dist.__main__ import main
from tf_dist.ops import supervisor
from tf_dist.ops.supervisor import Patience, saved_step, with_run_dir

# Ends with the codes in a file, one after another; `+` saves a checkpoint first, a signal's name is a death.
JOB = """
import os, pathlib, signal, sys
run_dir = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
left = run_dir / "ends"
ends = left.read_text().split()
left.write_text(" ".join(ends[1:]))
if ends[0].startswith("+"):
    (run_dir / "checkpoints" / f"step-{len(ends):08d}").mkdir(parents=True)
word = ends[0].strip("+")
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "deaf":
    (run_dir / "status.json").write_text('{"state": "failed"}')
    while True:
        signal.pause()
if word == "wait":
    (run_dir / "waiting").touch()
    signal.pause()
if word in ("save", "stuck"):
    signal.signal(signal.SIGUSR1, lambda *_: word == "save" and sys.exit(75))
    (run_dir / "waiting").touch()
    while True:
        signal.pause()
if word == "look":
    mpirun = ("PRTE_MCA_rmaps_default_mapping_policy", "OMPI_ALLOW_RUN_AS_ROOT")
    words = [repr(sys.stdin.read()), *(os.environ.get(name, "-") for name in mpirun)]
    (run_dir / "seen").write_text(" ".join(words))
    sys.exit(0)
sys.exit(int(word))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(ends, *flags)``: exit code, and what is left of the ends."""
    (tmp_path / "job.py").write_text(JOB)
    mpirun = tmp_path / "mpirun"
    mpirun.write_text('#!/bin/sh\necho "$@" >> "$0.log"\nshift 2\nexec "$@"\n')
    mpirun.chmod(0o755)
    monkeypatch.setattr(Patience, "pause_s", lambda self, failures: 0.0)

    def start(ends, *flags):
        (tmp_path / "ends").write_text(ends)
        job = [str(tmp_path / "job.py"), "--run-dir", str(tmp_path)]
        code = main(["run", "-np", "3", "--mpirun", str(mpirun), *flags, "--", *job])
        return code, (tmp_path / "ends").read_text()

    return start


def test_until_it_is_done(run, tmp_path, capfd):
    assert run("70 kill 0 70") == (0, "70")
    assert len((tmp_path / "mpirun.log").read_text().splitlines()) == 3
    said = capfd.readouterr().err
    assert "ended with exit code 70" in said and "ended with signal 9" in said


@pytest.mark.parametrize("code", [64, 65, 69, 76, 77, 78])
def test_what_would_only_repeat_itself_is_not_tried_again(run, code):
    assert run(f"{code} 0") == (code, "0")


def test_a_saved_one_goes_on(run):
    assert run("75 0") == (0, "")


def test_patience_ends(run, capfd):
    assert run("70 kill 71 0", "--tries", "3") == (71, "0")
    assert "giving up: 3 failures in a row without a new checkpoint" in capfd.readouterr().err


def test_a_signal_is_counted_as_shells_do(run):
    assert run("kill 0", "--tries", "1") == (137, "0")


def test_a_launcher_that_does_not_end_after_its_job_has_failed(run, tmp_path, monkeypatch, capfd):
    """What the job before has said does not count."""
    monkeypatch.setattr(supervisor, "DEAF_S", 0.1)
    monkeypatch.setattr(supervisor, "LOOK_EVERY_S", 0.02)
    (tmp_path / "status.json").write_text('{"state": "failed"}')
    assert run("70 deaf 0") == (0, "")
    said = capfd.readouterr().err
    assert said.count("it is killed. Is a host out of reach?") == 1 and "ended with signal 9" in said


def test_new_checkpoints_bring_new_patience(run):
    assert run("70 +70 70 0", "--tries", "3") == (0, "")
    assert run("70 70 70 0", "--tries", "3") == (70, "0")


@pytest.mark.parametrize(
    ("ends", "signals", "code"),
    [
        ("wait 0", [signal.SIGTERM], 128 + signal.SIGTERM),  # it could not listen yet
        ("save 0", [signal.SIGTERM], 75),
        ("save 0", [signal.SIGINT], 75),
        ("save 0", [signal.SIGHUP], 75),
        ("save 0", [signal.SIGUSR1], 75),
        ("stuck 0", [signal.SIGINT, signal.SIGINT], 128 + signal.SIGTERM),
    ],
)
def test_a_signal_lets_the_job_save_and_is_the_end(run, tmp_path, ends, signals, code):
    (tmp_path / "ends").write_text(ends)
    job = ["--", str(tmp_path / "job.py"), "--run-dir", str(tmp_path)]
    words = ["-m", "tf_dist", "run", "--mpirun", str(tmp_path / "mpirun"), *job]
    process = subprocess.Popen([sys.executable, *words])
    deadline = time.monotonic() + 60
    while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)  # two at once are one to the system
    assert process.wait(60) == code and (tmp_path / "ends").read_text() == "0"


def test_a_job_reads_nothing_and_may_be_started_as_root_on_few_cores(run, tmp_path):
    """``while read``, with the list of jobs as standard input; in a container, with no .venv activated."""
    (tmp_path / "ends").write_text("look")
    words = ["--mpirun", str(tmp_path / "mpirun"), "--", str(tmp_path / "job.py"), "--run-dir", str(tmp_path)]
    unset = (*supervisor.OVERSUBSCRIBE, *supervisor.AS_ROOT)
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-m", "tf_dist", "run", *words]
    subprocess.run(command, input=b"the rest\n", env=environment, check=True, timeout=60)
    root = "1" if os.getuid() == 0 else "-"
    assert (tmp_path / "seen").read_text() == f"'' :oversubscribe {root}"


def test_what_a_user_has_set_for_mpirun_stays(monkeypatch):
    theirs = {"PRTE_MCA_rmaps_default_mapping_policy": "core"}
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert supervisor.launcher_environment(theirs) == theirs


def test_no_launcher(tmp_path, capsys):
    words = ["run", "--mpirun", str(tmp_path / "none"), "--", "job.py", "--run-dir", str(tmp_path)]
    assert main(words) == 78 and "cannot start" in capsys.readouterr().err


def test_no_job(capsys):
    assert main(["run", "-np", "2"]) == 64 and "give the job after --" in capsys.readouterr().err


def test_pauses_double_up_to_a_limit():
    pauses = [Patience(9, 1.0, 10.0).pause_s(n) for n in range(1, 7)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_folder_is_made_where_none_is_named(tmp_path):
    words, folder = with_run_dir(["train.py", "--steps", "3"])
    assert words == ["train.py", "--steps", "3", "--run-dir", str(folder)] and folder.parts[0] == "runs"
    for given in (["a.py", "--run-dir", "there"], ["a.py", "--run-dir=there"]):
        found, folder = with_run_dir(given)
        assert found == given and os.fspath(folder) == "there"


def test_steps_are_read_from_names(tmp_path):
    assert saved_step(tmp_path / "none") == 0
    for name in ("step-00000020", "step-00000100", ".tmp-step-00000300-1-2", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saved_step(tmp_path) == 100
