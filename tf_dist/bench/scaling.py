"""Scaling: one model on 1, 2 and 4 ranks, with the rows of a rank fixed (weak) or of all ranks (strong).

    python scripts/bench.py scaling             # three models
    python scripts/bench.py scaling gpt-0.81M   # one of them

For each number of ranks one job times by turns our Trainer and, as a ceiling, Keras's optimizer on our model
on every rank alone, with nothing exchanged; each with the rows of both kinds of scaling. The jobs are gone
through ROUNDS times. A number of ranks above that of cores is marked with a star: its ranks share cores, and
efficiency counts cores there.

With T(N) the time of a step on N ranks and C the smaller of N and the number of cores, efficiency is

    weak     N T(1) / (C T(N))      N times the rows, in the time of one rank
    strong   T(1) / (C T(N))        the same rows, in the C-th part of the time

Strong scaling has each rank compute its rows as one micro-batch: fewer rows make smaller matrices, and what
they lose shows in the ceiling as well. Every rank has one thread, also where it is alone.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tf_dist.bench import models, plots, runner

MODULE = "tf_dist.bench.scaling"
FOLDER = runner.FOLDER / "scaling"
RANKS = (1, 2, 4)
KINDS = ("weak", "strong")
DROPPED = 3


def main(words: Sequence[str] = ()) -> int:
    """Go through the jobs, model by model; print a table for each."""
    found = {}
    for name in models.chosen(list(words)):
        done: dict[int, list[dict[str, Any]]] = {}
        for turn in range(runner.ROUNDS):
            for ranks in RANKS:
                print(f"{name} on {ranks} ranks, round {turn + 1} of {runner.ROUNDS} ...", flush=True)
                done.setdefault(ranks, []).append(runner.measured(ranks, MODULE, name, folder=FOLDER))
        found[name] = summary(done)
        print(f"\n{table(name, found[name])}\n", flush=True)
    path = runner.save("scaling", {"models": found})
    print(f"in {path}\nand {picture(found, path.with_suffix('.png'))}")
    return 0


def summary(done: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each kind and number of ranks, with medians over all rounds, and efficiencies."""
    cores = os.cpu_count() or 1
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        for ranks, rounds in done.items():
            if f"ours {kind}" not in rounds[0]["times_ms"]:
                continue  # fewer rows than ranks
            row = {"kind": kind, "ranks": ranks, "tokens": rounds[0]["tokens"][kind]}
            for way in ("ours", "ceiling"):
                times = [time for found in rounds for time in found["times_ms"][f"{way} {kind}"]]
                row[f"{way}_ms"] = statistics.median(times)
            rows.append(row)
        first = next(row for row in rows if row["kind"] == kind)
        for row in (row for row in rows if row["kind"] == kind):
            row["of_ceiling"] = row["ceiling_ms"] / row["ours_ms"]
            row["efficiency"] = efficiency(kind, row["ranks"], cores, first["ours_ms"], row["ours_ms"])
    return rows


def efficiency(kind: str, ranks: int, cores: int, one_ms: float, many_ms: float) -> float:
    """The share of the cores' work that is not lost, as the module says."""
    work = ranks if kind == "weak" else 1
    return work * one_ms / (min(ranks, cores) * many_ms)


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Efficiency last."""
    head = [name, "ranks", "ms", "tokens/s", "ceiling ms", "of the ceiling", "efficiency"]
    cells = [
        [
            *(row["kind"], runner.ranks_named(row["ranks"]), f"{row['ours_ms']:.1f}"),
            *(f"{1e3 * row['tokens'] / row['ours_ms']:,.0f}", f"{row['ceiling_ms']:.1f}"),
            *(f"{row['of_ceiling']:.2f}", f"{row['efficiency']:.2f}"),
        ]
        for row in rows
    ]
    return runner.table(head, cells) + "\n* more ranks than cores"


def picture(found: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Efficiency and what the ceiling would have, over the number of ranks; a panel for each model."""
    panels = []
    for name, rows in found.items():
        drawn: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            drawn.setdefault(f"{row['kind']}, tf_dist", []).append((row["ranks"], row["efficiency"]))
            ceiling = row["efficiency"] / row["of_ceiling"]
            drawn.setdefault(f"{row['kind']}, nothing exchanged", []).append((row["ranks"], ceiling))
        panels.append(plots.Lines(name, "ranks", "efficiency", drawn, level=1.0, ticks=RANKS))
    return plots.lines(path, panels)


# On the ranks ------------------------------------------------------------------------------------


def main_on_ranks(name: str, out: Path) -> None:
    """Both kinds of scaling on these ranks, ours and the ceiling by turns."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect(threads_per_rank=1)
    from tf_dist.bench import systems

    sizes, rows, steps = models.RECIPES[name]
    works, tokens = {}, {}
    for kind, mine in {"weak": rows, "strong": rows // comm.size}.items():
        if mine:
            works[f"ours {kind}"] = systems.Ours(comm, sizes, mine).step
            works[f"ceiling {kind}"] = systems.compute_alone(sizes, mine)
            tokens[kind] = mine * comm.size * sizes["seq_len"]
    times_ms = runner.timings(comm, works, DROPPED + max(4, steps // 2), DROPPED)
    if comm.rank == 0:
        out.write_text(json.dumps({"ranks": comm.size, "tokens": tokens, "times_ms": times_ms}))


if __name__ == "__main__":
    main_on_ranks(sys.argv[1], Path(sys.argv[2]))
