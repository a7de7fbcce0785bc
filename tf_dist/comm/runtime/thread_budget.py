"""Thread budget: a rank's share of the node's cores, given to TensorFlow before it is imported.

TensorFlow uses every core it sees, and reads its limit only once: when it first computes.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from threadpoolctl import threadpool_limits

from tf_dist import terminal
from tf_dist.comm.runtime import core_binding, startup
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import LaunchError

# Every thread pool that TensorFlow, NumPy or the tokenizers may start.
THREAD_VARIABLES = (
    "TF_NUM_INTRAOP_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
)
# What TensorFlow 2.21 prints on import, whatever its log level: its log is not set up yet.
CHATTER = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\)|I\d{4} |To enable the following "
)


@dataclass(frozen=True)
class Placement:
    """Where a rank runs: its node, the ranks beside it, and the threads it may use."""

    host: str
    local_rank: int
    local_size: int
    cores: tuple[int, ...]
    threads: int


def places(comm: Comm) -> list[Placement]:
    """Placement of every rank, in rank order; a collective.

    Each core is shared by the ranks that may run on it, so ranks bound to a core each get one
    thread, and unbound ranks get an equal share of the node.
    """
    mine = {"host": socket.gethostname(), "cores": sorted(os.sched_getaffinity(0)), "quota": cpu_quota()}
    everyone = comm.allgather_obj(mine)
    return [_place(everyone, rank) for rank in range(comm.size)]


def _place(everyone: list[dict[str, Any]], rank: int) -> Placement:
    host, cores = everyone[rank]["host"], everyone[rank]["cores"]
    beside = [other for other in range(len(everyone)) if everyone[other]["host"] == host]
    claims = Counter(core for other in beside for core in everyone[other]["cores"])
    share = sum(1.0 / claims[core] for core in cores)
    share = min(share, everyone[rank]["quota"] / len(beside))
    # The epsilon: three thirds of a core are a core.
    threads = max(1, int(share + 1e-6))
    return Placement(host, beside.index(rank), len(beside), tuple(cores), threads)


def cpu_quota() -> float:
    """Cores that a container may use (cgroup v2 ``cpu.max``), or infinity: affinity does not show it."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return 1e9 if quota == "max" else max(1.0, float(quota) / float(period))
    except (OSError, ValueError):
        return 1e9


# Thread counts that this process has set for TensorFlow.
_told: list[int] = []


def set_threads(comm: Comm, threads_per_rank: int = 0) -> Placement:
    """Set this rank's threads, by environment variables that TensorFlow reads when it first computes.

    If TensorFlow has already computed, it keeps its threads, and rank 0 reports it.

    Returns:
        This rank's placement, with its share of threads.

    Raises:
        LaunchError: Keras is set to another framework.
    """
    everywhere = places(comm)
    place = everywhere[comm.rank]
    threads = threads_per_rank or place.threads
    framework = _keras_framework()
    if framework != "tensorflow":
        raise LaunchError(
            f"Keras's backend is {framework!r}: tf_dist trains with tensorflow. "
            "Set KERAS_BACKEND=tensorflow, or leave it unset"
        )
    # Inter-op parallelism only pays with spare threads; or between nodes, where gradients are reduced during
    # the backward pass: with one thread TensorFlow would hand them over only after everything else.
    between_nodes = len({at.host for at in everywhere}) > 1
    at_once = 2 if between_nodes else min(2, threads)
    if _accepts_threads(threads, at_once):
        os.environ |= {name: str(threads) for name in THREAD_VARIABLES}
        os.environ["TF_NUM_INTEROP_THREADS"] = str(at_once)
        _told.append(threads)
    elif comm.rank == 0 and threads not in _told[-1:]:  # set here before, and TensorFlow has computed since
        terminal.write_error(
            "warning: TensorFlow has computed something before tf_dist.connect(), so its threads can no "
            f"longer be set: this rank keeps all that it took, not its share ({threads}). Ranks that share "
            "cores are slower for it. Call connect() first"
        )
    # NumPy was imported before, and its BLAS took all cores: with four ranks on two cores a PowerSGD step of
    # an LSTM took five times as long.
    threadpool_limits(threads, user_api="blas")
    others = (
        core_binding.warning(os.environ.get(startup.JOB, ""), place.cores) if not place.local_rank else ""
    )
    if others:
        terminal.write_error(others)
    # TensorFlow's INFO and WARNING lines, once per rank, would drown ours. Errors are still shown.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    return Placement(place.host, place.local_rank, place.local_size, place.cores, threads)


def _keras_framework() -> str:
    """The framework of Keras: of the imported one, or the one that it will choose."""
    keras = sys.modules.get("keras")
    if keras is not None and hasattr(keras, "config"):
        return str(keras.config.backend())
    return os.environ.setdefault("KERAS_BACKEND", "tensorflow")


def _accepts_threads(threads: int, at_once: int) -> bool:
    """Whether TensorFlow still accepts this thread count: it may be imported, but must not have computed."""
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is None:
        return True
    try:
        tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
        tensorflow.config.threading.set_inter_op_parallelism_threads(at_once)
    except RuntimeError:  # "cannot be modified after initialization"; an equal number is accepted
        return False
    return True


def load_tensorflow() -> None:
    """Import TensorFlow, without the four greeting lines it prints on every rank.

    Other output is passed on, and with ``TF_CPP_MIN_LOG_LEVEL=0`` everything is.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        import tensorflow

        return
    with _without(CHATTER):
        import tensorflow  # noqa: F401


@contextmanager
def _without(lines: re.Pattern[bytes]) -> Iterator[None]:
    """Capture stderr, also C++'s, and drop the lines that match a pattern."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as heard:
        stderr = os.dup(2)
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            heard.seek(0)
            for line in heard:
                if not lines.match(line):
                    os.write(2, line)
