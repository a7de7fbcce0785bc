"""Training steps: ours against other ways to train the same Keras model on the same cores.

On N ranks, in one job and in turn: our Trainer; compute alone (each rank trains by itself, nothing is
exchanged: the ceiling); Keras with a plain mpi4py `Allreduce`. In jobs of their own between those: Horovod
inside the step, whose thread would take time from all others; and Keras's own ``fit`` in one process with all
cores, with and without XLA.

Every way has the same model, optimizer (AdamW), and rows in a step. One table: tokens per second of all
ranks, and where the time of our step goes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.bench import models, running

if TYPE_CHECKING:
    from tf_dist.comm.base import Comm

MODULE = "tf_dist.bench.step"
FOLDER = running.FOLDER / "step"
RANKS = (1, 2)
DROPPED = 3
# Model, rows of a rank, and steps of each kind that count.
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "gpt-10.7M": (models.GPT, 4, 12),
    "gpt-0.81M": (models.GPT_SMALL, 12, 40),
    "lstm-1.08M": (models.LSTM, 32, 20),
}
WAYS = {"ours": "tf_dist", "compute": "compute alone", "mpi4py": "mpi4py", "horovod": "Horovod"}
PARTS = ("input", "forward+backward", "pack", "wait", "reduce", "update")


def main() -> int:
    """Start the jobs, model by model; print a table for each."""
    found = {}
    for name in MODELS:
        jobs = {}
        for ranks in RANKS:
            print(f"{name} on {ranks} rank{'s' * (ranks > 1)} ...", flush=True)
            jobs[f"np {ranks}"] = running.measured(ranks, MODULE, "ranks", name, folder=FOLDER)
            if importlib.util.find_spec("horovod") is not None:
                jobs[f"np {ranks} "] = running.measured(ranks, MODULE, "horovod", name, folder=FOLDER)
        for xla in ("plain", "xla"):
            print(f"{name} in one process with Keras's fit, {xla} ...", flush=True)
            jobs[f"keras {xla}"] = running.measured(0, MODULE, "fit", name, xla, folder=FOLDER)
        found[name] = jobs
        print(f"\n{tables(name, jobs)}\n", flush=True)
    print(f"in {running.save('step', {'models': found})}")
    return 0


def tables(name: str, jobs: dict[str, Any]) -> str:
    """Tokens per second of every way, ours last as a ratio; and the parts of our step."""
    most = f"np {RANKS[-1]}"
    ours = jobs[most]["tokens_per_s"]["ours"]
    rows = []
    for job, found in jobs.items():
        for way, speed in found["tokens_per_s"].items():
            rows.append([f"{job.strip()}, {WAYS.get(way, way)}", f"{speed:,.0f}", f"{ours / speed:.2f}"])
    speeds = running.table([name, "tokens/s", f"ours at {most} / it"], rows)
    parts = jobs[most]["parts_ms"]
    cells = [[f"our step at {most}, ms", *(f"{parts[part]:.2f}" for part in PARTS), f"{parts['step']:.2f}"]]
    return f"{speeds}\n\n{running.table(['', *PARTS, 'step'], cells)}"


# On the ranks ------------------------------------------------------------------------------------


def main_on_ranks(name: str, out: Path) -> None:
    """All ways that need ranks, in turn, but for Horovod."""
    from tf_dist.comm import launch

    comm = launch.connect()  # sets threads, so before anything that imports Keras
    from tf_dist.bench import ways

    sizes, rows, _ = MODELS[name]
    ours = ways.Ours(comm, sizes, rows)
    works = {
        "ours": ours.step,
        "compute": ways.compute_alone(sizes, rows),
        "mpi4py": ways.plain_mpi4py(comm, sizes, rows),
    }
    note(name, comm, works, out, lambda: {"parts_ms": ours.parts_ms(DROPPED)})


def horovod(name: str, out: Path) -> None:
    """Horovod alone."""
    from tf_dist.comm import launch

    comm = launch.connect("horovod")
    from tf_dist.bench import ways

    sizes, rows, _ = MODELS[name]
    note(name, comm, {"horovod": ways.horovod(comm, sizes, rows)}, out, dict)


def note(
    name: str, comm: Comm, works: dict[str, Callable[[], Any]], out: Path, more: Callable[[], dict[str, Any]]
) -> None:
    """Time some ways in turn; rank 0 leaves tokens per second of all ranks in a file."""
    sizes, rows, steps = MODELS[name]
    medians_ms = running.interleaved(comm, works, DROPPED + steps, DROPPED)
    tokens = rows * comm.size * sizes["seq_len"]
    if comm.rank == 0:
        speeds = {way: 1e3 * tokens / median for way, median in medians_ms.items()}
        out.write_text(json.dumps({"ranks": comm.size, "tokens_per_s": speeds, **more()}))


def fit(name: str, xla: str, out: Path) -> None:
    """Keras's own ``fit`` in one process, with a global batch of all ranks and all cores."""
    cores = len(os.sched_getaffinity(0))
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(cores)
    from tf_dist.comm import threads

    threads.load_tensorflow()
    from tf_dist.bench import ways

    sizes, rows, steps = MODELS[name]
    rows *= RANKS[-1]
    median_s = ways.keras_fit_step_s(sizes, rows, DROPPED + steps, DROPPED, xla == "xla")
    found = {f"fit on {cores} cores, {xla}": rows * sizes["seq_len"] / median_s}
    out.write_text(json.dumps({"ranks": 0, "tokens_per_s": found}))


if __name__ == "__main__":
    if sys.argv[1] == "fit":
        fit(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        {"ranks": main_on_ranks, "horovod": horovod}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
