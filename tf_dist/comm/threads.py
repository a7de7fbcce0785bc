"""A rank's share of the node's cores, given to TensorFlow before it is imported.

TensorFlow takes every core it sees, and reads how many it may use only once: when it first computes.
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
from tf_dist.comm import cores, starting
from tf_dist.comm.base import Comm
from tf_dist.errors import LaunchError

# Every pool of threads that TensorFlow, NumPy or the tokenizers may start.
THREAD_VARIABLES = (
    "TF_NUM_INTRAOP_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
)
# What TensorFlow 2.21 prints while it is loaded, whatever its log level: its log is not set up yet.
CHATTER = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\)|I\d{4} |To enable the following "
)


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its node, the ranks beside it, and the threads it may use."""

    host: str
    local_rank: int
    local_size: int
    cores: tuple[int, ...]
    threads: int


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


# How many TensorFlow was told to take, by this process.
_told: list[int] = []


def set_threads(comm: Comm, threads_per_rank: int = 0) -> Place:
    """Give this rank its threads, by environment variables that TensorFlow reads when it first computes.

    Where it has done so already it keeps all threads that it took, and rank 0 says so.

    Returns:
        This rank's place, with the number of threads that are its share.

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
    # More than one operation at a time only pays when there are threads to spare; or between nodes, where
    # gradients leave during the backward pass: one thread would hand them over when all the rest is done.
    between_nodes = len({at.host for at in everywhere}) > 1
    at_once = 2 if between_nodes else min(2, threads)
    if _can_be_told(threads, at_once):
        os.environ |= {name: str(threads) for name in THREAD_VARIABLES}
        os.environ["TF_NUM_INTEROP_THREADS"] = str(at_once)
        _told.append(threads)
    elif comm.rank == 0 and threads not in _told[-1:]:  # by us, and it has computed with them since
        terminal.write_error(
            "warning: TensorFlow has computed something before tf_dist.connect(), so its threads can no "
            f"longer be set: this rank keeps all that it took, not its share ({threads}). Ranks that share "
            "cores are slower for it. Call connect() first"
        )
    # NumPy has been here before, and its BLAS took all cores: with four ranks on two cores a PowerSGD step of
    # an LSTM took five times as long.
    threadpool_limits(threads, user_api="blas")
    others = cores.warning(os.environ.get(starting.JOB, ""), place.cores) if not place.local_rank else ""
    if others:
        terminal.write_error(others)
    # TensorFlow's INFO and WARNING lines, once per rank, would bury ours. Errors still show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    return Place(place.host, place.local_rank, place.local_size, place.cores, threads)


def _keras_framework() -> str:
    """What Keras computes with: of the one that is imported, or what it will be told."""
    keras = sys.modules.get("keras")
    if keras is not None and hasattr(keras, "config"):
        return str(keras.config.backend())
    return os.environ.setdefault("KERAS_BACKEND", "tensorflow")


def _can_be_told(threads: int, at_once: int) -> bool:
    """Whether TensorFlow will still take these threads: it may be imported, but must not have computed."""
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is None:
        return True
    try:
        tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
        tensorflow.config.threading.set_inter_op_parallelism_threads(at_once)
    except (
        RuntimeError
    ):  # "cannot be modified after initialization"; which the same number may, says TensorFlow
        return False
    return True


def load_tensorflow() -> None:
    """Import TensorFlow, without the four lines of greeting it prints on every rank.

    Whatever else it says is passed on, and with ``TF_CPP_MIN_LOG_LEVEL=0`` everything is.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        import tensorflow

        return
    with _without(CHATTER):
        import tensorflow  # noqa: F401


@contextmanager
def _without(lines: re.Pattern[bytes]) -> Iterator[None]:
    """Hold back stderr, C++'s as well, and drop the lines that begin with a pattern."""
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
