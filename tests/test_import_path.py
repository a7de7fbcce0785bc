"""`python -m tf_dist` in a folder of somebody else imports nothing that lies there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tf_dist.import_path import leave_current_folder

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("command", "leaves"),
    [
        (["python", "-m", "tf_dist", "doctor"], True),
        (["python", "-X", "dev", "-m", "tf_dist.bench"], True),
        (["python", "-m", "theirs.train"], False),
        (["python", "train.py", "-m", "tf_dist_like"], False),
        (["python", "train.py"], False),
    ],
)
def test_only_our_own_commands_leave_it(command, leaves, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = [str(tmp_path), "/lib"]
    leave_current_folder(path, command, str(tmp_path / "elsewhere" / "tf_dist"))
    assert path == (["/lib"] if leaves else [str(tmp_path), "/lib"])
    path = [str(tmp_path), "/lib"]
    leave_current_folder(path, command, str(tmp_path / "tf_dist"))  # a checkout
    assert path == [str(tmp_path), "/lib"]


def test_a_module_in_the_current_folder_is_not_taken_for_a_package(tmp_path):
    for name in ("yaml", "numpy", "threadpoolctl", "argparse"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w')\nraise SystemExit(3)\n")
    command = [sys.executable, "-m", "tf_dist", "checkpoint", "show", "."]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False, text=True)
    assert done.returncode == 77 and "there is no checkpoint" in done.stderr
    assert not (tmp_path / "executed").exists()
