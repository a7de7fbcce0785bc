"""What tests start jobs with: a user's environment, the launcher, and the processes of a session."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def sourced_environment():
    """What ``source scripts/mpi_environment.sh`` gives, for jobs that run beside each other."""
    sourced = ["bash", "-c", f"source '{ROOT / 'scripts' / 'mpi_environment.sh'}' && env -0"]
    lines = subprocess.run(sourced, capture_output=True, check=True, text=True).stdout.split("\0")
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    # Else ranks that wait spin on the cores that a job beside theirs needs.
    return found | {"OMPI_MCA_mpi_yield_when_idle": "1"}


def mpirun():
    """The mpirun beside this Python, or on PATH; None: neither."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def session_members(leader):
    """The processes of a session that are alive, by their ids."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                members.append(int(entry.name))
    return members
