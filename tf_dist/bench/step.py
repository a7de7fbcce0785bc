"""Training steps: ours against other ways to train the same model on the same cores.

    python scripts/bench.py step                # three models, about a quarter of an hour
    python scripts/bench.py step gpt-0.81M      # one of them

Ways that can share a job are timed in it by turns: our Trainer, with its defaults, with ``--xla on`` and, for
the largest model, with ``--precision bfloat16``; our Trainer on each rank alone, and Keras's
optimizer on our model, each rank alone (nothing is exchanged: the two ceilings); Keras with a plain mpi4py
`Allreduce`. The others have a job each: Horovod inside the step, with its defaults and with the settings of
HOROVOD_SETTINGS, the fastest of which is shown; MultiWorkerMirroredStrategy with a loop of its own; PyTorch's
DDP; and, in one process with all cores, Keras's ``fit`` with and without XLA, and PyTorch. The list of jobs
is gone through ROUNDS times, so that a busy minute of the machine does not meet one of them alone; medians
are over all steps.

Every way has the same model, optimizer (AdamW), and rows in a step. Printed are tokens per second of all
ranks, where the time of our step goes, and its share of the peak of matrix products (`flops`).
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tf_dist.bench import flops, models, plots, runner

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm

MODULE = "tf_dist.bench.step"
TORCH_MODULE = "tf_dist.bench.torch_ways"
FOLDER = runner.FOLDER / "step"
RANKS = 2
DROPPED = 3
# The model that is large enough for bfloat16 to pay.
BFLOAT16 = "gpt-10.7M"
# Beside the defaults, a cycle of 1 ms and fusion up to 128 MB. A short cycle answers sooner, a long one
# leaves the core to the computation, and without fusion nothing is copied into a buffer first. Horovod reads
# these once, and cannot be started again in one process, so each is a job.
HOROVOD_SETTINGS = ("HOROVOD_CYCLE_TIME=0.2", "HOROVOD_CYCLE_TIME=10", "HOROVOD_FUSION_THRESHOLD=0")
WAYS = {
    "ours": "tf_dist",
    "ours xla": "tf_dist, --xla on",
    "ours bfloat16": "tf_dist, --precision bfloat16",
    "alone": "tf_dist on each rank alone",
    "compute": "compute alone, Keras's optimizer",
    "mpi4py": "Keras, mpi4py Allreduce",
    "horovod": "Horovod, defaults",
    "mwms": "MultiWorkerMirroredStrategy, own loop, ring",
    "ddp": "PyTorch DDP, gloo",
    "plain": "Keras fit",
    "xla": "Keras fit, XLA",
    "torch": "PyTorch",
}
CEILINGS = ("alone", "compute")
PARTS = ("input", "forward+backward", "pack", "wait", "reduce", "update")


class StepJob(NamedTuple):
    """What is started: ranks (0: one process with all cores), its first word, and another if it has one."""

    ranks: int
    kind: str
    word: str = ""

    @property
    def peer(self) -> bool:
        """Whether the others can be shown without it."""
        return self.kind != "ranks"


class Row(NamedTuple):
    """A line of the table: where it ran, the way, and the median over all rounds."""

    ranks: int
    way: str
    median_ms: float
    tokens_per_s: float
    steps: int


def jobs() -> list[StepJob]:
    """All jobs of a model in the order of a round."""
    found = [StepJob(1, "ranks"), StepJob(RANKS, "ranks"), StepJob(RANKS, "horovod")]
    found += [StepJob(RANKS, "horovod", setting) for setting in HOROVOD_SETTINGS]
    found += [StepJob(RANKS, "mwms"), StepJob(RANKS, "ddp")]
    return [*found, StepJob(0, "fit", "plain"), StepJob(0, "fit", "xla"), StepJob(0, "one")]


def main(words: Sequence[str] = ()) -> int:
    """Go through the jobs, model by model; print a table for each."""
    found = {}
    for name in models.chosen(list(words)):
        found[name] = measure(name)
        print(f"\n{tables(name, found[name])}\n", flush=True)
    path = runner.save("step", {"models": found})
    print(f"in {path}\nand {picture(found, path.with_suffix('.png'))}")
    return 0


def measure(name: str) -> dict[str, Any]:
    """All rounds of a model: its rows, the parts of our step, and what could not be measured and why."""
    done: dict[StepJob, list[dict[str, Any]]] = {}
    absent: dict[str, str] = {}
    for turn in range(runner.ROUNDS):
        for job in jobs():
            label = f"{name}: {' '.join(filter(None, [job.kind, job.word]))} on {where(job.ranks)}"
            if absent.get(job.kind) is None:
                print(f"{label}, round {turn + 1} of {runner.ROUNDS} ...", flush=True)
                try:
                    found = run(name, job)
                    done.setdefault(job, []).append(found)
                except runner.Absent as reason:
                    absent[job.kind] = str(reason)
                except SystemExit as failure:
                    if not job.peer:
                        raise
                    absent[job.kind] = str(failure)
    names = {**WAYS, "fit": "Keras fit", "one": "PyTorch in one process"}
    return summary(name, done) | {"absent": {names[kind]: why for kind, why in absent.items()}}


def where(ranks: int) -> str:
    """``2 ranks``, or one process."""
    return f"{ranks} rank{'s' * (ranks > 1)}" if ranks else "one process, all cores"


def run(name: str, job: StepJob) -> dict[str, Any]:
    """Start a job; what it found."""
    python, module, words = sys.executable, MODULE, [job.kind, name, *filter(None, [job.word])]
    if job.kind in ("ddp", "one"):
        python, module = runner.torch_python(), TORCH_MODULE
    elif job.kind == "horovod":
        runner.need_horovod()
    elif job.kind == "mwms":
        words.append(",".join(map(str, free_ports(job.ranks))))
    result: dict[str, Any] = runner.measured(job.ranks, module, *words, folder=FOLDER, python=python)
    return result


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def summary(name: str, done: dict[StepJob, list[dict[str, Any]]]) -> dict[str, Any]:
    """Rows from the times of all rounds; of Horovod's settings only the fastest stays."""
    rows: list[Row] = []
    parts: dict[int, dict[str, float]] = {}
    gemm_ms: dict[int, float] = {}
    for job, rounds in done.items():
        for way in rounds[0]["times_ms"]:
            times = [time for found in rounds for time in found["times_ms"][way]]
            median = statistics.median(times)
            if way == "gemm":
                gemm_ms[job.ranks] = median
                continue
            speed = 1e3 * rounds[0]["tokens"] / median
            rows.append(Row(job.ranks, f"{way} {job.word}".strip(), median, speed, len(times)))
        if "parts_ms" in rounds[0]:
            parts[job.ranks] = {
                part: statistics.median(found["parts_ms"][part] for found in rounds)
                for part in rounds[0]["parts_ms"]
            }
    settings = [row for row in rows if row.way.startswith("horovod HOROVOD")]
    slower = sorted(settings, key=lambda row: row.median_ms)[1:]
    shown = [row for row in rows if row not in slower]
    return {
        "rows": [row._asdict() for row in shown],
        "horovod_sweep_ms": {row.way.removeprefix("horovod "): row.median_ms for row in settings},
        "parts_ms": {str(ranks): found for ranks, found in parts.items()},
        "gemm": gemm(name, shown, parts, gemm_ms),
    }


def gemm(
    name: str, rows: list[Row], parts: dict[int, dict[str, float]], gemm_ms: dict[int, float]
) -> dict[str, dict[str, float]]:
    """Shares of our step, and of its forward and backward pass, in a core's peak in the same job."""
    recipe = models.RECIPES[name]
    operations = flops.of_step(recipe.sizes, recipe.rows)
    found = {}
    for row in rows:
        if row.way == "ours":
            peak = flops.peak_per_s(gemm_ms[row.ranks])
            both_ms = parts[row.ranks]["forward+backward"]
            found[f"np {row.ranks}"] = {
                "peak_gflops": peak / 1e9,
                "forward+backward": operations / (1e-3 * both_ms) / peak,
                "step": operations / (1e-3 * row.median_ms) / peak,
            }
    return found


# What is shown -----------------------------------------------------------------------------------


def named(row: dict[str, Any]) -> str:
    """``np 2, tf_dist``, or ``one process, PyTorch``."""
    way, _, word = row["way"].partition(" ")
    name = WAYS.get(row["way"]) or WAYS.get(word) or WAYS.get(way, row["way"])
    if way == "horovod" and word:
        name = f"Horovod, {word}"
    return f"np {row['ranks']}, {name}" if row["ranks"] else f"one process, {name}"


def speed_of(found: dict[str, Any], ranks: int, way: str) -> float | None:
    """Tokens per second of one way, or None where it was not measured."""
    rows = [row for row in found["rows"] if row["ranks"] == ranks and row["way"] == way]
    return float(rows[0]["tokens_per_s"]) if rows else None


def tables(name: str, found: dict[str, Any]) -> str:
    """Tokens per second of every way, ours last as a ratio; the parts of our step; its share of the peak."""
    ours = speed_of(found, RANKS, "ours") or 0.0
    rows = [
        [
            *(named(row), f"{row['median_ms']:.1f}", f"{row['tokens_per_s']:,.0f}"),
            f"{ours / row['tokens_per_s']:.2f}",
        ]
        for row in found["rows"]
    ]
    shown = [runner.table([name, "ms", "tokens/s", f"ours at np {RANKS} / it"], rows)]
    shown += [f"not measured: {way}: {why}" for way, why in found["absent"].items()]
    cells = [
        [
            f"our step at np {ranks}, ms",
            *(f"{parts.get(part, 0.0):.2f}" for part in PARTS),
            f"{parts['step']:.2f}",
        ]
        for ranks, parts in found["parts_ms"].items()
    ]
    shown.append(runner.table(["", *PARTS, "step"], cells))
    cells = [
        [
            *(at, f"{100 * share['forward+backward']:.0f} %", f"{100 * share['step']:.0f} %"),
            f"{share['peak_gflops']:.0f}",
        ]
        for at, share in found["gemm"].items()
    ]
    head = ["share of the peak of products", "forward+backward", "step", "peak, GFLOP/s of a rank"]
    return "\n\n".join([*shown, runner.table(head, cells)])


def picture(found: dict[str, Any], path: Path) -> Path:
    """Tokens per second, one panel for each model."""
    panels = []
    for name, model in found.items():
        labels = [named(row) for row in model["rows"]]
        ours = [row["way"] == "ours" for row in model["rows"]]
        panels.append(plots.Bars(name, labels, [row["tokens_per_s"] for row in model["rows"]], ours))
    return plots.bars(path, "tokens per second", panels)


# On the ranks ------------------------------------------------------------------------------------


def main_on_ranks(name: str, out: Path) -> None:
    """The ways that can share a job, in turn."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect()  # sets threads, so before anything that imports Keras
    from tf_dist.bench import systems
    from tf_dist.comm.transport.base import SerialComm

    sizes, rows, _ = models.RECIPES[name]
    ours = systems.Ours(comm, sizes, rows)
    works = {"ours": ours.step, "compute": systems.compute_alone(sizes, rows)}
    if comm.size > 1:
        works["ours xla"] = systems.Ours(comm, sizes, rows, xla="on").step
        if name == BFLOAT16:
            works["ours bfloat16"] = systems.Ours(comm, {**sizes, "precision": "bfloat16"}, rows).step
        works["alone"] = systems.Ours(SerialComm(), sizes, rows).step
        works["mpi4py"] = systems.plain_mpi4py(comm, sizes, rows)
    works["gemm"] = flops.peak_product()
    note(name, comm, works, out, lambda: {"parts_ms": ours.parts_ms(DROPPED)})


def horovod(name: str, *words: str) -> None:
    """Horovod alone, with a setting of its environment."""
    for setting in words[:-1]:
        key, _, value = setting.partition("=")
        os.environ[key] = value
    from tf_dist.comm.runtime import launch

    comm = launch.connect("horovod")
    from tf_dist.bench import systems

    sizes, rows, _ = models.RECIPES[name]
    note(name, comm, {"horovod": systems.horovod(comm, sizes, rows)}, Path(words[-1]), dict)


def mwms(name: str, ports: str, out: Path) -> None:
    """MultiWorkerMirroredStrategy alone; MPI starts the workers and times them."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect()
    workers = [f"127.0.0.1:{port}" for port in ports.split(",")]
    cluster = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": comm.rank}}
    os.environ["TF_CONFIG"] = json.dumps(cluster)
    from tf_dist.bench import systems

    sizes, rows, _ = models.RECIPES[name]
    step, weights = systems.multi_worker(sizes, rows, comm.rank)
    note(name, comm, {"mwms": step}, out, dict)
    from tf_dist.comm.runtime.consensus import agree

    agree(comm, {"weights": weights()}, "what MultiWorkerMirroredStrategy trained")
    sys.stdout.flush()
    comm.barrier()
    comm.barrier()


def note(
    name: str, comm: Comm, works: dict[str, Callable[[], Any]], out: Path, more: Callable[[], dict[str, Any]]
) -> None:
    """Time some ways in turn; rank 0 leaves the milliseconds of each step, and tokens in one, in a file."""
    sizes, rows, steps = models.RECIPES[name]
    times_ms = runner.timings(comm, works, DROPPED + steps, DROPPED)
    if comm.rank == 0:
        tokens = rows * comm.size * sizes["seq_len"]
        out.write_text(json.dumps({"tokens": tokens, "times_ms": times_ms, **more()}))


def fit(name: str, xla: str, out: Path) -> None:
    """Keras's own ``fit`` in one process, with a global batch of as many ranks and all cores."""
    cores = len(os.sched_getaffinity(0))
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(cores)
    from tf_dist.comm.runtime import thread_budget

    thread_budget.load_tensorflow()
    from tf_dist.bench import systems

    sizes, rows, steps = models.RECIPES[name]
    times_ms = systems.keras_fit_ms(sizes, rows * cores, DROPPED + steps, DROPPED, xla == "xla")
    out.write_text(json.dumps({"tokens": rows * cores * sizes["seq_len"], "times_ms": {"fit": times_ms}}))


def started(kind: str, name: str, *words: str) -> None:
    """What `launch` starts on every rank, or in one process."""
    if kind == "ranks":
        main_on_ranks(name, Path(words[0]))
    elif kind == "horovod":
        horovod(name, *words)
    else:
        {"fit": fit, "mwms": mwms}[kind](name, words[0], Path(words[1]))


if __name__ == "__main__":
    started(*sys.argv[1:])
