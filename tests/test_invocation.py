"""Help and hints name commands that exist where the user stands."""

import sys

import pytest

from tf_dist import invocation
from tf_dist.cli.main import COMMANDS
from tf_dist.cli.run import for_python
from tf_dist.invocation import command, program, spelled


@pytest.mark.parametrize(
    ("started", "checkout", "train", "doctor", "job"),
    [
        ("/opt/bin/tf-dist", True, "tf-dist train", "tf-dist doctor", "-- tf-dist train"),
        ("/x/tf_dist/__main__.py", True, "python -m tf_dist train", "python -m tf_dist doctor",
         "-- scripts/train.py"),
        ("/x/tf_dist/__main__.py", False, "python -m tf_dist train", "python -m tf_dist doctor",
         "-- tf-dist train"),
        ("scripts/train.py", True, "python scripts/train.py", "python -m tf_dist doctor",
         "-- scripts/train.py"),
        ("mine.py", True, "python scripts/train.py", "python -m tf_dist doctor", "-- scripts/train.py"),
        ("mine.py", False, "tf-dist train", "tf-dist doctor", "-- tf-dist train"),
        ("", False, "tf-dist train", "tf-dist doctor", "-- tf-dist train"),
    ],
)  # fmt: skip
def test_commands_are_spelled_as_they_are_started(
    started, checkout, train, doctor, job, monkeypatch, tmp_path
):
    monkeypatch.setattr(sys, "argv", [started])
    if not checkout:
        monkeypatch.setattr(invocation, "FOLDER", tmp_path / "scripts")
    assert (command("train"), command("doctor")) == (train, doctor)
    assert program("train") == train.removeprefix("python scripts/")
    assert spelled("mpirun -np 2 tf-dist train --x; tf-dist doctor") == f"mpirun -np 2 {train} --x; {doctor}"
    assert spelled("run -np 2 -- tf-dist train --x") == f"run -np 2 {job} --x"
    assert spelled("a tf-dist, and tf_dist train") == "a tf-dist, and tf_dist train"


def test_a_checkout_has_a_script_for_each():
    assert {path.stem for path in invocation.FOLDER.glob("*.py")} >= set(invocation.SCRIPTS)
    assert set(COMMANDS) >= set(invocation.SCRIPTS)


def test_a_job_of_run_is_a_script_or_our_command():
    assert for_python(["/opt/bin/tf-dist", "train", "--x"]) == ["-m", "tf_dist", "train", "--x"]
    assert for_python(["scripts/train.py", "--x"]) == ["scripts/train.py", "--x"]
