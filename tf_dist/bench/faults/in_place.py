"""Campaign of in-place recovery: ranks are killed, and the others finish their step.

    python scripts/bench.py faults in-place            # 50 jobs on 3 ranks and 50 on 4, a quarter of an hour
    python scripts/bench.py faults in-place seeds=10 ranks=4

In each job all ranks but one are killed (SIGKILL), one after another: who, in which step and when in it (also
beyond it, in a validation or while a checkpoint is written) is drawn from the seed. Rank 0 is one like any
other. The ranks that are left go on in place (`tf_dist.training.in_place_recovery`).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from tf_dist.bench import runner
from tf_dist.ops.supervisor import own_mpirun

MODULE = "tf_dist.bench.faults.on_ranks"
FOLDER = runner.FOLDER / "faults"
RANKS: tuple[int, ...] = (3, 4)
SEEDS = 50


def main(seeds: int = SEEDS, counts: Sequence[int] = RANKS) -> list[dict[str, Any]]:
    """Start the jobs, so many on each number of ranks."""
    jobs = []
    for ranks in counts:
        print(f"{seeds} jobs on {ranks} ranks ...", flush=True)
        calm = trained(ranks, 0, 0)
        runs = [trained(ranks, ranks - 1, seed) for seed in range(seeds)]
        jobs.append({"ranks": ranks, "calm": calm, "runs": runs})
    return jobs


def trained(ranks: int, deaths: int, seed: int) -> dict[str, Any]:
    """What a job leaves behind; nothing but the seed where it does not end well."""
    by = [own_mpirun(), "--with-ft", "ulfm", "-np", str(ranks)]
    try:
        found = runner.measured(ranks, MODULE, str(deaths), str(seed), folder=FOLDER, by=by)
    except SystemExit as error:
        print(f"seed {seed}: {error}", file=sys.stderr)
        return {"seed": seed}
    return {"seed": seed, **found}


def sound(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that have ended with the weights of the calm one."""
    wanted = job["calm"].get("weights_sha256")
    return [run for run in job["runs"] if wanted and run.get("weights_sha256") == wanted]


def table(jobs: Sequence[dict[str, Any]]) -> str:
    """A line for each number of ranks. ms: from the error that a rank meets to where all go on."""
    rows = []
    for job in jobs:
        good = sound(job)
        took = [one["ms"] for run in good for one in run["recoveries"]] or [float("nan")]
        deaths = sum(len(one["lost"]) for run in good for one in run["recoveries"])
        rows.append(
            [
                f"{job['ranks']}",
                f"{len(good)} of {len(job['runs'])}",
                f"{deaths}",
                f"{sum(0 in one['lost'] for run in good for one in run['recoveries'])}",
                f"{statistics.median(took):.1f}",
                f"{max(took):.1f}",
            ]
        )
    head = ["killed in place, ranks", "same weights", "deaths", "of rank 0", "median ms", "worst ms"]
    return runner.table(head, rows)
