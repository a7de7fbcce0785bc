"""All-reduce within a node, 4 KB to 256 MB: ours, MPI's `Allreduce`, Horovod, and the memory-bandwidth limit.

Each kind is timed in turn in one job, on the same sizes. Ours is what a training step does: terms lie in the
shared window, the sum stays there, and the squares for the norm are taken on the way. The limit is R ranks
reading R S and writing S of memory of their own, at the same time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.bench import plots, runner

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm

MODULE = "tf_dist.bench.comm"
FOLDER = runner.FOLDER / "comm"
RANKS = (2, 4)
SIZES_BYTES = tuple(4 << 10 << 2 * power for power in range(9))  # 4 KB, 16 KB .. 256 MB
DROPPED = 3
NAMES = {"limit": "memory limit", "ours": "tf_dist", "mpi": "MPI Allreduce", "horovod": "Horovod"}


def main() -> int:
    """Start the ranks; print a table for each number of them."""
    jobs = []
    for ranks in RANKS:
        print(f"{ranks} ranks ...", flush=True)
        jobs.append(runner.measured(ranks, MODULE, folder=FOLDER))
    for job in jobs:
        print(f"\n{runner.ranks_named(job['ranks'])} ranks, ms\n{sums_table(job)}")
    path = runner.save("comm", {"jobs": jobs})
    print(f"\nin {path}\nand {picture(jobs, path.with_suffix('.png'))}")
    return 0


def picture(jobs: list[dict[str, Any]], path: Path) -> Path:
    """Milliseconds of each kind over the size; a panel for each number of ranks."""
    panels = []
    for job in jobs:
        kinds = [kind for kind in NAMES if kind in job["sums"][0]]
        drawn = {
            NAMES[kind]: [(found["bytes"] / (1 << 20), found[kind]) for found in job["sums"]]
            for kind in kinds
        }
        title = f"sums over {runner.ranks_named(job['ranks'])} ranks"
        panels.append(plots.Lines(title, "MB", "ms", drawn, log="xy"))
    return plots.lines(path, panels)


def sums_table(job: dict[str, Any]) -> str:
    """One row for each size; the ratios last."""
    kinds = [kind for kind in NAMES if kind in job["sums"][0]]
    head = ["size", *(NAMES[kind] for kind in kinds), "of the limit", *(f"{k} / ours" for k in kinds[2:])]
    rows = []
    for found in job["sums"]:
        times = [found[kind] for kind in kinds]
        ratios = [found[kind] / found["ours"] for kind in kinds[2:]]
        cells = [f"{time:.3f}" for time in times] + [f"{found['limit'] / found['ours']:.2f}"]
        rows.append([size_named(found["bytes"]), *cells, *(f"{ratio:.1f}" for ratio in ratios)])
    return runner.table(head, rows)


def size_named(size_bytes: int) -> str:
    """``4 KB`` or ``64 MB``."""
    return f"{size_bytes >> 20} MB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KB"


# On the ranks ------------------------------------------------------------------------------------


def main_on_ranks(out: Path) -> None:
    """Measure all sizes; rank 0 leaves the medians in a file."""
    from tf_dist.comm.runtime import launch
    from tf_dist.comm.transport import mpi
    from tf_dist.errors import BackendMissing

    mpi.CHUNK_BYTES = 1 << 40  # one call, as a user would write it; sums in the window have no messages
    comm = launch.connect()
    try:
        horovod: Comm | None = launch.use_backend(comm, "horovod")
    except BackendMissing:
        horovod = None
    job = {"ranks": comm.size, "sums": [medians(comm, horovod, size) for size in SIZES_BYTES]}
    if comm.rank == 0:
        out.write_text(json.dumps(job))


def medians(comm: Comm, horovod: Comm | None, size_bytes: int) -> dict[str, float]:
    """Median milliseconds of each kind of sum of float32."""
    import numpy as np

    from tf_dist.parallel.flat_buffer import aligned_empty
    from tf_dist.parallel.reduction_tree import one_each

    length = size_bytes // 4
    made = one_each(comm.size)
    buffers = comm.term_buffers(length, made)
    assert buffers is not None, comm.carried_by
    array, out = aligned_empty(length), aligned_empty(length)
    array.fill(0.0)

    def ours() -> None:
        comm.allreduce_terms(buffers(), made, out)

    works: dict[str, Callable[[], Any]] = {
        "limit": limit(comm.size, np.ones(-(-length // comm.size), np.float32)),
        "ours": ours,
        "mpi": lambda: comm.allreduce(array),
    }
    if horovod is not None:
        works["horovod"] = lambda: horovod.allreduce(array)
    times = DROPPED + (11 if size_bytes > 32 << 20 else 31)
    return {"bytes": size_bytes, **runner.interleaved(comm, works, times, DROPPED)}


def limit(size: int, mine: Any) -> Callable[[], Any]:
    """Read R slices and write one, in memory of this rank's own."""
    from tf_dist.comm.transport.reduction_order import add_in_order

    slices = [mine, *(mine.copy() for _ in range(size - 1))]
    additions = [(0, other) for other in range(1, size)]
    return lambda: add_in_order(slices, additions)


if __name__ == "__main__":
    main_on_ranks(Path(sys.argv[1]))
