"""Ranks are killed at random, and the weights must be those of a run in which nobody died.

    python scripts/bench.py faults                     # 50 jobs on 3 ranks and 50 on 4, a quarter of an hour
    python scripts/bench.py faults seeds=10 ranks=4
    python scripts/bench.py faults files               # of checkpoints alone, half a minute
    python scripts/bench.py faults culprits            # of one rank: nobody waits for it (`faults_of_ranks`)

In each job all ranks but one are killed (SIGKILL), one after another: who, in which step and when in it (also
beyond it, in a validation or while a checkpoint is written) is drawn from the seed. Rank 0 is one like any
other. The ranks that are left go on in place (`tf_dist.training.in_place`). Before that checkpoints are
damaged, and their writers killed (`faults_of_files`).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from tf_dist.bench import faults_of_files, faults_of_ranks, running
from tf_dist.restarts import own_mpirun

MODULE = "tf_dist.bench.faults_on_ranks"
FOLDER = running.FOLDER / "faults"
RANKS: tuple[int, ...] = (3, 4)
SEEDS = 50


def main(words: Sequence[str] = ()) -> int:
    """Start the jobs; a table, a JSON file, and 1 where one of them ended otherwise than in peace.

    Args:
        words: seeds=N jobs on each number of ranks; ranks=N on this number only; files: none; culprits:
            those of `faults_of_ranks` instead.
    """
    options = dict(word.split("=", 1) for word in words if "=" in word)
    if "culprits" in words:
        return culprits(int(options.get("seeds", faults_of_ranks.SEEDS)))
    files = faults_of_files.main()
    print(f"{faults_of_files.table(files)}\n", flush=True)
    seeds, counts = int(options.get("seeds", SEEDS)), RANKS
    if "files" in words:
        counts = ()
    elif "ranks" in options:
        counts = (int(options["ranks"]),)
    jobs = list[dict[str, Any]]()
    for ranks in counts:
        print(f"{seeds} jobs on {ranks} ranks ...", flush=True)
        calm = trained(ranks, 0, 0)
        jobs.append(
            {"ranks": ranks, "calm": calm, "runs": [trained(ranks, ranks - 1, s) for s in range(seeds)]}
        )
    if jobs:
        print(f"\n{table(jobs)}\n")
    print(f"in {running.save('faults', {'files': files, 'jobs': jobs})}")
    all_sound = faults_of_files.sound(files) and all(len(sound(job)) == len(job["runs"]) for job in jobs)
    return int(not all_sound)


def culprits(seeds: int) -> int:
    """Let one rank of each job fail; as `main`."""
    found = faults_of_ranks.main(seeds)
    print(f"\n{faults_of_ranks.table(found)}\n")
    print(f"in {running.save('faults', {'culprits': found})}")
    return int(not faults_of_ranks.sound(found))


def trained(ranks: int, deaths: int, seed: int) -> dict[str, Any]:
    """What a job leaves behind; nothing but the seed where it does not end well."""
    by = [own_mpirun(), "--with-ft", "ulfm", "-np", str(ranks)]
    try:
        found = running.measured(ranks, MODULE, str(deaths), str(seed), folder=FOLDER, by=by)
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
    return running.table(head, rows)
