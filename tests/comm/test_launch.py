import os
import subprocess
import sys
from pathlib import Path

import pytest

from tf_dist.comm import launch
from tf_dist.comm.base import SerialComm
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
    with pytest.raises(LaunchError, match="started 4 processes, but each sees an MPI world of 1") as caught:
        launch.check_launcher(1, environment)
    assert caught.value.exit_code == 78
    assert "Open MPI v5.0.10" in str(caught.value)
    advice = "srun --mpi=pmix" if "SLURM_PROCID" in environment else "the mpirun of the same installation"
    assert advice in str(caught.value)


@pytest.mark.parametrize(("rank", "said"), [("0", "error: mpi4py cannot load an MPI library"), ("1", "")])
def test_a_launcher_without_an_mpi_library_is_refused_once(tmp_path, rank, said):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('there is none')")
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), root]),
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": rank,
    }
    command = [sys.executable, "-c", "from tf_dist.comm import launch; launch.join()"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 78
    assert ended.stderr.startswith(said) and "Traceback" not in ended.stderr
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


# Shares of a node ---------------------------------------------------------------------------------


def rank_on(host, cores, quota=1e9):
    return {"host": host, "cores": list(cores), "quota": quota}


def threads(everyone):
    return [launch._place(everyone, rank).threads for rank in range(len(everyone))]


def test_bound_ranks_have_their_own_cores():
    assert threads([rank_on("a", [core]) for core in range(4)]) == [1, 1, 1, 1]
    assert threads([rank_on("a", range(4)), rank_on("a", range(4, 8))]) == [4, 4]


def test_free_ranks_share_the_node():
    assert threads([rank_on("a", range(8))]) == [8]
    assert threads([rank_on("a", range(8))] * 2) == [4, 4]
    assert threads([rank_on("a", range(8))] * 3) == [2, 2, 2]
    # 3 x 1/3 is 0.99... in floating point, and still a whole core.
    assert threads([rank_on("a", range(3))] * 3) == [1, 1, 1]
    assert threads([rank_on("a", range(9))] * 3) == [3, 3, 3]


def test_more_ranks_than_cores_get_one_thread_each():
    assert threads([rank_on("a", range(2))] * 5) == [1] * 5


def test_masks_that_overlap():
    assert threads([rank_on("a", range(4)), rank_on("a", range(2, 4))]) == [3, 1]


def test_two_hosts_do_not_share_cores():
    everyone = [rank_on("a", range(4)), rank_on("b", range(4)), rank_on("a", range(4))]
    assert threads(everyone) == [2, 4, 2]
    made = [launch._place(everyone, rank) for rank in range(3)]
    assert [(place.host, place.local_rank, place.local_size) for place in made] == [
        ("a", 0, 2), ("b", 0, 1), ("a", 1, 2),
    ]  # fmt: skip
    assert made[1].cores == (0, 1, 2, 3)


def test_a_quota_is_shared_by_the_ranks_of_its_host():
    assert threads([rank_on("a", range(64), quota=2.0)]) == [2]
    assert threads([rank_on("a", range(64), quota=4.0)] * 2) == [2, 2]
    assert threads([rank_on("a", range(64), quota=1.5)] * 2) == [1, 1]
    assert threads([rank_on("a", range(2), quota=16.0)]) == [2]


def test_this_process_has_a_place():
    [place] = launch.places(SerialComm())
    assert place.cores == tuple(sorted(os.sched_getaffinity(0)))
    assert 1 <= place.threads <= len(place.cores)
    assert launch.cpu_quota() >= 1


# Threads and backends -----------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    """An environment of our own, in which TensorFlow was not imported yet."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    return os.environ


def test_threads_are_set_before_tensorflow_reads_them(environment):
    place = launch.set_threads(SerialComm(), 3)
    assert place.threads == 3
    assert {environment[name] for name in launch.THREAD_VARIABLES} == {"3"}
    assert environment["TF_NUM_INTEROP_THREADS"] == "2"
    assert environment["KERAS_BACKEND"] == "tensorflow"


def test_the_share_is_the_default(environment):
    place = launch.set_threads(SerialComm())
    assert environment["OMP_NUM_THREADS"] == str(place.threads)


def test_tensorflow_came_first(environment, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", object())
    with pytest.raises(LaunchError, match=r"before tf_dist.connect\(\)"):
        launch.set_threads(SerialComm(), 3)
    environment["TF_NUM_INTRAOP_THREADS"] = "3"  # but with the threads we want
    launch.set_threads(SerialComm(), 3)


def test_another_keras(environment):
    environment["KERAS_BACKEND"] = "jax"
    with pytest.raises(LaunchError, match="KERAS_BACKEND is 'jax'"):
        launch.set_threads(SerialComm(), 1)


def test_backends():
    comm = SerialComm()
    assert launch.use_backend(comm, "mpi") is comm
    with pytest.raises(UsageError, match="unknown backend 'smoke': mpi or horovod") as caught:
        launch.use_backend(comm, "smoke")
    assert caught.value.exit_code == 64


def test_notes_of_failures_need_hooks():
    launch.on_failure(lambda code, message: None)  # without hooks there is nobody to call it
