"""Two hosts over a network of 1 and 10 Gbit/s: all-reduce and training steps.

The hosts are emulated on this machine (``scripts/emulate_cluster.py``), one rank each, so a checkout, root
and iproute2 are needed. In one job and in turn: our Trainer with gradients that leave during the backward
pass, and without; compute alone (nothing is exchanged: the ceiling); Keras with a plain mpi4py `Allreduce`.
In a job of its own, for its thread takes time from all others: Horovod inside the step.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.bench import models, plots, runner

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm
    from tf_dist.data.rows import Rows
    from tf_dist.data.sampler import Sampler
    from tf_dist.training.trainer import Trainer

MODULE = "tf_dist.bench.network"
FOLDER = runner.FOLDER / "network"
CLUSTER = Path("scripts/emulate_cluster.py")
RATES = ("1gbit", "10gbit")
HOSTS, ROWS = 2, 4
# Python: there is no checkout. The script: a tool is missing, or namespaces are not permitted.
NOT_HERE = (2, 69, 78)
SUM_LENGTH, SUMS, STEPS, DROPPED = 10_700_000, 7, 9, 2
SUM_NAMES = {"ours": "tf_dist, chosen pieces", "ours 2 MiB": "tf_dist, 2 MiB", "mpi": "MPI Allreduce"}
STEP_NAMES = {
    "overlap": "tf_dist",
    "in turn": "tf_dist, no overlap",
    "mpi4py": "mpi4py",
    "horovod": "Horovod",
    "compute": "compute alone",
}


def main() -> int:
    """Start the jobs, rate by rate; one table of sums, one of steps."""
    command = [sys.executable, str(CLUSTER)]
    check = subprocess.run([*command, "--check"], capture_output=True, text=True)
    if check.returncode in NOT_HERE:
        print(f"bench-network is skipped: {check.stderr.strip()}")
        return 0
    found = {}
    for rate in RATES:
        by = [*command, "--hosts", str(HOSTS), "--rate", rate, "--"]
        print(f"{HOSTS} hosts at {rate} ...", flush=True)
        job = runner.measured(HOSTS, MODULE, "ranks", rate, folder=FOLDER, by=by)
        try:
            runner.need_horovod()
        except runner.Absent as reason:
            print(f"not measured: Horovod: {reason}")
        else:
            theirs = runner.measured(HOSTS, MODULE, "horovod", rate, folder=FOLDER, by=by)
            for part in ("sums_ms", "steps_ms"):
                job[part].update(theirs[part])
        found[rate] = job
    print(f"\n{sums_table(found)}\n\n{steps_table(found)}")
    for rate, job in found.items():
        print(f"{rate}: {job['said']}")
    path = runner.save("network", {"rows_per_rank": ROWS, "rates": found})
    print(f"\nin {path}\nand {picture(found, path.with_suffix('.png'))}")
    return 0


def picture(found: dict[str, Any], path: Path) -> Path:
    """Tokens per second of every way; a panel for each rate."""
    panels = []
    for rate, job in found.items():
        known = [way for way in STEP_NAMES if way in job["steps_ms"]]
        speeds = [tokens_per_s(job["steps_ms"][way]) for way in known]
        labels = [STEP_NAMES[way] for way in known]
        panels.append(plots.Bars(f"two hosts at {rate}", labels, speeds, [way == "overlap" for way in known]))
    return plots.bars(path, "tokens per second, GPT 10.7 M", panels)


def tokens_per_s(step_ms: float) -> float:
    """Tokens of all ranks in a second."""
    return float(1e3 * HOSTS * ROWS * models.GPT["seq_len"] / step_ms)


def sums_table(found: dict[str, Any]) -> str:
    """Sums alone; the ratio last."""
    names = {**SUM_NAMES, "horovod": "Horovod"}
    rows = [
        [f"{rate}, {names[kind]}", f"{time_ms:.1f}", f"{time_ms / job['sums_ms']['ours']:.2f}"]
        for rate, job in found.items()
        for kind, time_ms in job["sums_ms"].items()
    ]
    return runner.table([f"a sum of {4e-6 * SUM_LENGTH:.0f} MB", "ms", "it / ours"], rows)


def steps_table(found: dict[str, Any]) -> str:
    """Training steps, and what of their exchange is waited for; the ratio last."""
    rows = []
    for rate, job in found.items():
        for way, name in STEP_NAMES.items():
            if way not in job["steps_ms"]:
                continue
            step_ms = job["steps_ms"][way]
            parts = job["parts_ms"].get(way)
            cells = (
                [f"{parts[part]:.1f}" for part in ("under way", "exposed", "wait")] if parts else ["", "", ""]
            )
            ratio = step_ms / job["steps_ms"]["overlap"]
            rows.append(
                [f"{rate}, {name}", f"{step_ms:.0f}", *cells, f"{tokens_per_s(step_ms):,.0f}", f"{ratio:.2f}"]
            )
    head = ["GPT 10.7 M, ms of a step", "step", "exchange", "exposed", "wait", "tokens/s", "it / ours"]
    return runner.table(head, rows)


# On the ranks ------------------------------------------------------------------------------------


def main_on_ranks(out: Path) -> None:
    """All ways but Horovod, in turn."""
    from tf_dist.comm.runtime import launch
    from tf_dist.comm.transport import mpi

    comm = launch.connect()  # sets threads, so before anything that imports Keras
    mpi.CHUNK_BYTES = 1 << 40  # one call, as a user would write it
    from tf_dist.bench import systems

    sums_ms, said = sums(comm)
    works: dict[str, Callable[[], Any]] = {}
    parts: dict[str, Parts] = {}
    for way, wanted in (("overlap", "on"), ("in turn", "off")):
        made = systems.trainer_of(
            comm, models.GPT, ROWS, micro_batches=1, overlap=wanted, chunk_bytes=comm.chunk_bytes
        )
        parts[way] = Parts(comm, *made)
        works[way] = parts[way].step
        said += f"; {made[0].runner.said}" if made[0].runner.said else ""
    works["mpi4py"] = systems.plain_mpi4py(comm, models.GPT, ROWS)
    works["compute"] = systems.compute_alone(models.GPT, ROWS)
    steps_ms = runner.interleaved(comm, works, DROPPED + STEPS, DROPPED)
    parts_ms = {way: part.medians_ms(DROPPED) for way, part in parts.items()}
    note(comm, out, {"sums_ms": sums_ms, "steps_ms": steps_ms, "parts_ms": parts_ms, "said": said})


class Parts:
    """Steps of a trainer, with what its exchange takes and how much of it is waited for."""

    def __init__(self, comm: Comm, trainer: Trainer, sequences: Rows, sampler: Sampler) -> None:
        self._comm, self._trainer, self._data = comm, trainer, (sequences, sampler)
        self._taken: list[dict[str, float]] = []

    def _clocks(self) -> dict[str, float]:
        comm = self._comm
        return {"under way": comm.under_way_s, "exposed": comm.comm_s, "wait": comm.wait_s}

    def step(self) -> None:
        """One step."""
        before = self._clocks()
        self._trainer.train_step(*self._data)
        self._taken.append({name: now - before[name] for name, now in self._clocks().items()})

    def medians_ms(self, dropped: int) -> dict[str, float]:
        """Median milliseconds of each part of a step on this rank."""
        import numpy as np

        counted = self._taken[dropped:]
        found = {part: 1e3 * float(np.median([step[part] for step in counted])) for part in counted[0]}
        return {**found, "under way": found["under way"] or found["exposed"]}


def sums(comm: Comm) -> tuple[dict[str, float], str]:
    """Median milliseconds of each kind of sum, and what was chosen."""
    from tf_dist.parallel.flat_buffer import aligned_empty
    from tf_dist.parallel.reduction_tree import one_each
    from tf_dist.parallel.transport_tuning import USUAL_CHUNK_BYTES, choose_chunk

    made = one_each(comm.size)
    array = aligned_empty(SUM_LENGTH)
    array.fill(0.0)
    said = choose_chunk(comm, SUM_LENGTH, made).removeprefix("; ")
    chosen = comm.chunk_bytes

    def ours(chunk_bytes: int) -> None:
        comm.chunk_bytes = chunk_bytes
        comm.allreduce_terms([array], made, array)

    works: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(chosen),
        "ours 2 MiB": lambda: ours(USUAL_CHUNK_BYTES),
        "mpi": lambda: comm.allreduce(array),
    }
    medians_ms = runner.interleaved(comm, works, DROPPED + SUMS, DROPPED)
    comm.chunk_bytes = chosen
    return medians_ms, said


def horovod(out: Path) -> None:
    """Horovod alone."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect("horovod")
    from tf_dist.bench import systems
    from tf_dist.parallel.flat_buffer import aligned_empty

    array = aligned_empty(SUM_LENGTH)
    array.fill(0.0)
    sums_ms = runner.interleaved(comm, {"horovod": lambda: comm.allreduce(array)}, DROPPED + SUMS, DROPPED)
    works = {"horovod": systems.horovod(comm, models.GPT, ROWS)}
    note(
        comm,
        out,
        {"sums_ms": sums_ms, "steps_ms": runner.interleaved(comm, works, DROPPED + STEPS, DROPPED)},
    )


def note(comm: Comm, out: Path, report: dict[str, Any]) -> None:
    """Leave a report in a file, on rank 0."""
    if comm.rank == 0:
        out.write_text(json.dumps(report))


if __name__ == "__main__":
    {"ranks": main_on_ranks, "horovod": horovod}[sys.argv[1]](Path(sys.argv[3]))
