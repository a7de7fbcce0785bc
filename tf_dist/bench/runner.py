"""Shared by all benchmarks: start ranks, time the slowest of them, describe the machine.

A benchmark's module has ``main()``, which starts jobs of its own module with `launch` and prints what they
found. This process itself loads no MPI and no TensorFlow, so it takes no core from those that it measures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.ops.supervisor import own_mpirun

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm

FOLDER = Path("runs/bench")
LIMIT_S = 1800
ROUNDS = 2
# PyTorch lives in an environment of its own, which `make torch` makes.
TORCH = Path(__file__).resolve().parents[2] / ".venv-torch" / "bin" / "python"
HOW_TO_GET = {
    "torch": "no PyTorch in .venv-torch: `make torch` installs it",
    "horovod": "no Horovod: `make horovod` builds it",
}


class Absent(Exception):
    """A peer that cannot be measured here; the message says why, and how to get it."""


def launch(
    ranks: int, module: str, *words: str, log: Path, by: Sequence[str] = (), python: str = sys.executable
) -> None:
    """Run ``python -m module words`` on some ranks, 0 without mpirun; what they print goes to a log.

    ``by`` is a command that starts the ranks in mpirun's place.

    Raises:
        SystemExit: the job failed, or took longer than LIMIT_S seconds; the end of its log is printed.
    """
    command = [python, "-m", module, *words]
    if ranks and by:
        command = [*by, *command]
    elif ranks:
        command = [own_mpirun(), "-np", str(ranks), *command]
    run(command, log)


def run(command: Sequence[str], log: Path) -> None:
    """Run a command line, what it prints into a log; raises as `launch` does."""
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(log, "wb") as file:
            ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT_S)
        how = f"ended with {ended.returncode}" if ended.returncode else ""
    except subprocess.TimeoutExpired:
        how = f"was not over after {LIMIT_S} s, and was stopped"
    if how:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        raise SystemExit(f"error: {' '.join(command)} {how}; see {log}")


def measured(
    ranks: int,
    module: str,
    *words: str,
    folder: Path,
    by: Sequence[str] = (),
    python: str = sys.executable,
) -> Any:
    """Run a job as `launch` does, with the path of a file as its last word; the JSON that it leaves there."""
    name = "-".join([module.rpartition(".")[2], str(ranks), *words])
    out = folder / f"{name}.json"
    out.unlink(missing_ok=True)
    launch(ranks, module, *words, str(out), log=folder / f"{name}.log", by=by, python=python)
    return json.loads(out.read_text())


def torch_python() -> str:
    """The Python that has PyTorch.

    Raises:
        Absent: it is not installed.
    """
    if not TORCH.exists():
        raise Absent(HOW_TO_GET["torch"])
    return str(TORCH)


def need_horovod() -> None:
    """Raise `Absent` where Horovod is not installed."""
    if importlib.util.find_spec("horovod") is None:
        raise Absent(HOW_TO_GET["horovod"])


def timings(
    comm: Comm, works: Mapping[str, Callable[..., Any]], times: int, dropped: int
) -> dict[str, list[float]]:
    """Run each work in turn, so that all of them meet the same weather; milliseconds by name.

    A time is that of the slowest rank, from a barrier on. The first ``dropped`` of ``times`` do not count.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(times):
        for name, work in works.items():
            taken[name].append(slowest(comm, work))
    return {name: found[dropped:] for name, found in taken.items()}


def interleaved(
    comm: Comm, works: Mapping[str, Callable[..., Any]], times: int, dropped: int
) -> dict[str, float]:
    """The medians of `timings`."""
    found = timings(comm, works, times, dropped)
    return {name: statistics.median(taken) for name, taken in found.items()}


def slowest(comm: Comm, work: Callable[[], Any]) -> float:
    """Milliseconds that the slowest rank takes for a work."""
    comm.barrier()
    begun = time.perf_counter()
    work()
    return 1e3 * float(max(comm.allgather_obj(time.perf_counter() - begun)))


def save(name: str, report: dict[str, Any]) -> Path:
    """Write a report with the machine it was measured on."""
    path = FOLDER / name / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **report}, indent=1) + "\n")
    return path


def machine() -> dict[str, Any]:
    """Processor, cores, system and Python."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Words in columns, the first one to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        first, *others = (
            word.ljust(width) if column == 0 else word.rjust(width)
            for column, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]))
    return "\n".join(lines)


def ranks_named(ranks: int) -> str:
    """The number of ranks, marked where they are more than cores."""
    return f"{ranks}{'*' * (ranks > (os.cpu_count() or 1))}"
