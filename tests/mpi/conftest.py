"""Tests that run on N ranks at once: ``mpirun -np N python -m pytest tests/mpi``, or plainly on one.

A module says by its mark ``ranks`` which numbers of ranks show what it tests; `make test` runs it on those.
``TF_DIST_TESTS=all`` runs everything on any number.

A test is one test for all ranks. After each of its phases the ranks compare notes: where one failed, all
fail, and rank 0 shows the report of the one that did. So the ranks always run the same tests, and none
waits in a collective for a rank that has gone on. A test that fails in the middle of its own
collectives, where agreement cannot be reached, ends the job after `AGREE_S`.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from extended import EVERYTHING
from leaving import leave
from mpi4py import MPI

from tf_dist.comm.runtime import launch
from tf_dist.comm.runtime.collective_order import keep_order
from tf_dist.comm.transport.base import SerialComm

# How long a rank that failed waits for the others to come out of the test.
AGREE_S = 60
WORLD = MPI.COMM_WORLD.Dup()
# Of pytest; what fails before its session begins ends Python in the ordinary way.
EXIT_STATUS = 0
# Each rank has temporary folders of its own: N pytests that tidy up one folder at once trip over each other
# (an unclosed scandir in pytest's own sweep, a warning, so an error), once in some twenty jobs.
TEMPORARY = Path(tempfile.gettempdir(), f"tf_dist-tests-{os.getuid()}", f"rank-{WORLD.rank}")
TEMPORARY.mkdir(parents=True, exist_ok=True)
os.environ["PYTEST_DEBUG_TEMPROOT"] = str(TEMPORARY)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Rank 0 alone reports; it tells what failed on the others."""
    if WORLD.rank:
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_collection_modifyitems(config, items):
    """Leave out what other numbers of ranks show; on more than four, nothing."""
    marks = {item: item.get_closest_marker("ranks") for item in items}
    if EVERYTHING or WORLD.size > 4:
        return
    others = [item for item, mark in marks.items() if mark and WORLD.size not in mark.args]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def pytest_sessionfinish(exitstatus):
    global EXIT_STATUS
    EXIT_STATUS = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Nobody leaves before rank 0 has reported: mpirun ends all ranks when the first one fails."""
    sys.stdout.flush()
    WORLD.Barrier()
    leave(EXIT_STATUS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Make the outcome of a phase (setup, call, teardown) that of all ranks."""
    report = yield
    meet(report)
    notes = WORLD.allgather((report.outcome, report.longreprtext))
    outcomes = [outcome for outcome, _ in notes]
    failed = [rank for rank, outcome in enumerate(outcomes) if outcome == "failed"]
    if failed:
        report.outcome = "failed"
        report.longrepr = "\n".join(f"On rank {rank} of {WORLD.size}:\n{notes[rank][1]}" for rank in failed)
    elif len(set(outcomes)) > 1:
        report.outcome = "failed"
        report.longrepr = f"the ranks do not agree whether to skip this test: {outcomes}"
    return report


def meet(report):
    """Wait for all ranks. One that failed ends the job if the others stay inside a collective for good."""
    request = WORLD.Ibarrier()
    deadline = time.monotonic() + AGREE_S
    while not request.Test():
        if report.failed and time.monotonic() > deadline:
            text = f"rank {WORLD.rank} failed, and the other ranks do not come out of the test:"
            os.write(2, f"{text}\n{report.longreprtext}\n".encode())
            WORLD.Abort(1)
        time.sleep(0.001)


def from_rank_0(make):
    """What rank 0 alone makes. The others sleep: ranks may be more than cores."""
    made = make() if WORLD.rank == 0 else None
    request = WORLD.Ibarrier()
    while not request.Test():
        time.sleep(0.005)
    return WORLD.bcast(made)


@pytest.fixture(scope="session")
def connected():
    """All ranks, as a user's script gets them: before TensorFlow is imported, where nobody has yet."""
    return launch.join() if "tensorflow" in sys.modules else launch.connect()


@pytest.fixture
def everyone():
    """``everyone(value)``: what all ranks pass, in rank order, so that all can assert the same."""
    return WORLD.allgather


@pytest.fixture
def one_folder(tmp_path):
    """A temporary folder, the same one on all ranks."""
    return Path(WORLD.bcast(str(tmp_path)))


# The node of each rank: this machine; one for each; two, rank by rank or in halves.
NODES = {
    "one node": lambda rank, size: 0,
    "nodes of one rank": lambda rank, size: rank,
    "by turns": lambda rank, size: rank % 2,
    "halves": lambda rank, size: 2 * rank // size,
}


@pytest.fixture(scope="module", params=NODES)
def ranks(request, connected):
    """All ranks, on nodes that are made up: only who shares memory with whom is different."""
    world = MPI.COMM_WORLD
    nodes = [NODES[request.param](rank, world.size) for rank in range(world.size)]
    if len(set(Counter(nodes).values())) > 1:
        pytest.skip("nodes would have different numbers of ranks")
    from tf_dist.comm.transport.mpi import MPIComm

    return MPIComm(node=world.Split(nodes[world.rank]))


BACKENDS = ["mpi", "horovod"]
DEBUGGING = " in debug mode"


def made(kind, connected):
    """A Comm of all ranks that nobody else uses, by the name of its backend."""
    if kind.startswith("horovod"):
        pytest.importorskip("horovod", reason="Horovod is not installed: `make horovod`")
        new = launch.use_backend(connected, "horovod")
    else:
        from tf_dist.comm.transport.mpi import MPIComm

        new = MPIComm()
    return keep_order(new, {"TF_DIST_DEBUG": "1"}, WORLD.Dup) if kind.endswith(DEBUGGING) else new


# One rank has no order to keep.
IN_DEBUG_MODE = [name + DEBUGGING for name in BACKENDS if WORLD.size > 1]


@pytest.fixture(params=["serial", *BACKENDS, *IN_DEBUG_MODE])
def comm(request, connected):
    """Each kind of Comm. With ``serial`` every rank is alone."""
    return SerialComm() if request.param == "serial" else made(request.param, connected)


@pytest.fixture(params=BACKENDS)
def ordered(request, connected):
    """All ranks, over each backend, with every collective compared before it begins."""
    return made(request.param + DEBUGGING, connected)


@pytest.fixture(params=BACKENDS)
def carried(request, connected):
    """All ranks, over each backend."""
    if request.param == "horovod":
        pytest.importorskip("horovod", reason="Horovod is not installed: `make horovod`")
        return launch.use_backend(connected, "horovod")
    return connected
