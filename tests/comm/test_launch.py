import os
import subprocess
import sys
from pathlib import Path

import pytest

from tf_dist.comm.runtime import launch
from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError, UsageError


class Exited(Exception):
    """Stands in for the end of the process."""


@pytest.fixture(autouse=True)
def harmless(monkeypatch):
    """No MPI is loaded, nobody sleeps, and the process does not end."""

    def end(code):
        raise Exited(code)

    monkeypatch.setattr(launch, "_mpi_library", lambda: "Open MPI v5.0.10")
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(launch.os, "_exit", end)
    monkeypatch.setattr(launch, "_ending", None)


# The launcher check -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "environment"),
    [
        (1, {}),
        (1, {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}),
        (4, {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}),
        (4, {"PMI_SIZE": "4", "PMI_RANK": "2"}),
        (2, {"MPI_LOCALNRANKS": "1", "PMI_SIZE": "2", "PMI_RANK": "1"}),
        # mpirun inside a Slurm step: Slurm's variables are those of its daemons.
        (1, {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "SLURM_STEP_NUM_TASKS": "2"}),
        (4, {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}),
        # An interactive shell inside an allocation.
        (1, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}),
    ],
)
def test_launches_that_are_right(size, environment):
    launch.check_launcher(size, environment)


WRONG = {
    "openmpi": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
    "mpich": {"PMI_SIZE": "4", "PMI_RANK": "0"},
    "mvapich": {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "0"},
    "pals": {"PALS_SIZE": "4", "PALS_RANKID": "0"},
    "slurm": {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
    # One rank on each of four nodes: the number of local ranks must not hide the others.
    "mpich, one rank per node": {"MPI_LOCALNRANKS": "1", "PMI_SIZE": "4", "PMI_RANK": "0"},
}


@pytest.mark.parametrize("environment", WRONG.values(), ids=WRONG.keys())
def test_many_worlds_of_one_are_refused_by_the_first(monkeypatch, environment):
    monkeypatch.setattr(launch, "_ending", object())
    with pytest.raises(LaunchError, match=r"started 4 processes.* each sees an MPI world of 1") as caught:
        launch.check_launcher(1, environment)
    assert caught.value.exit_code == 78
    assert "Open MPI v5.0.10" in str(caught.value)
    advice = "srun --mpi=pmix" if "SLURM_PROCID" in environment else "the mpirun of the same installation"
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    "environment",
    [{"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, {"PMI_SIZE": "4", "PMI_RANK": "0"}],
)
def test_a_world_that_lacks_some_of_the_launched_is_refused(environment):
    """Two worlds of two, say: each would train a model of its own."""
    with pytest.raises(LaunchError, match=r"started 4 processes, but the MPI world has 2 \(") as caught:
        launch.check_launcher(2, environment)
    assert caught.value.exit_code == 78
    others = {name: "3" if name.endswith("RANK") else value for name, value in environment.items()}
    with pytest.raises(Exited, match="78"):
        launch.check_launcher(2, others)


def joining(path, rank):
    """A process that joins as one of 4 ranks of Open MPI's mpirun; modules in ``path`` first."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(path), str(Path(__file__).resolve().parents[2])]),
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": rank,
    }
    command = [sys.executable, "-c", "from tf_dist.comm.runtime import launch; launch.join()"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("rank", "said"), [("0", "error: mpi4py cannot load an MPI library"), ("1", "")])
def test_a_launcher_without_an_mpi_library_is_refused_once(tmp_path, rank, said):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('there is none')")
    ended = joining(tmp_path, rank)
    assert ended.returncode == 78
    assert ended.stderr.startswith(said) and "Traceback" not in ended.stderr
    assert bool(ended.stderr) == bool(said)


OTHER_MPI = """
import os

def Is_initialized():
    return False

def Get_library_version():
    return "MPICH Version:      5.0.2\\nMPICH Release date: today"

def Init_thread(level):
    os._exit(16)  # as MPICH does, with words about a PMI version
"""


@pytest.mark.parametrize(("rank", "said"), [("0", "started 4 processes"), ("1", "")])
def test_an_mpich_under_the_mpirun_of_open_mpi_is_refused_before_it_starts(tmp_path, rank, said):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("class rc: pass\n")
    (tmp_path / "mpi4py" / "MPI.py").write_text(OTHER_MPI)
    ended = joining(tmp_path, rank)
    assert ended.returncode == 78
    assert said in ended.stderr and "(MPICH Version: 5.0.2)" * bool(said) in ended.stderr
    assert bool(ended.stderr) == bool(said)


@pytest.mark.parametrize("rank_variable", launch.RANK_VARIABLES)
def test_the_others_leave_silently(capsys, rank_variable):
    with pytest.raises(Exited, match="78"):
        launch.check_launcher(1, {rank_variable: "2"})
    assert capsys.readouterr() == ("", "")


def test_the_rank_before_mpi_is_asked():
    assert launch.launched_rank({}) == 0
    assert launch.launched_rank({"PMI_RANK": "3"}) == 3
    assert launch.launched_rank({"SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "2"}) == 2


# Backends -----------------------------------------------------------------------------------------


def test_backends():
    comm = SerialComm()
    assert launch.use_backend(comm, "mpi") is comm
    with pytest.raises(UsageError, match="unknown backend 'smoke': mpi or horovod") as caught:
        launch.use_backend(comm, "smoke")
    assert caught.value.exit_code == 64


def test_notes_of_failures_need_hooks():
    launch.on_failure(lambda code, message: None)  # without hooks there is nobody to call it
