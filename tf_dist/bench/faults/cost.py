"""Overhead of fault tolerance while nothing fails: ULFM, watchdog, consistency check, checkpoints.

    python scripts/bench.py fault-cost                 # three models on 2 ranks, some minutes
    python scripts/bench.py fault-cost gpt-0.81M

ULFM is a switch of mpirun, so jobs with and without it take turns. Two jobs of a large model differ by more
than it can cost, so what counts is how many milliseconds longer the steps of a tiny model take, whose
collectives are as many; beside it stands what the steps of the model itself have taken. The rest is measured
in one job: what a beat of the watchdog takes, four times a second; what a comparison takes, every
`--check-every` steps; and by how much steps take longer in which a checkpoint is begun and written, against
as many without; "waited" is what ranks wait for before they go on. How often one is saved is Young's interval
(1974): the square root of 2 x cost of a checkpoint x time between failures. The last column is what
`--replicate` costs each time; usually it is off.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.bench import models, runner
from tf_dist.ops.supervisor import own_mpirun

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm

MODULE = "tf_dist.bench.faults.cost"
FOLDER = runner.FOLDER / "fault-cost"
RANKS = 2
DROPPED = 3
# Steps in a stretch with or without a checkpoint at its beginning, and such pairs.
STRETCH_S, PAIRS = 4.0, 5
# Between failures. A cluster of some hundred nodes has one in some hours; one an hour is hard times.
FAILS_EVERY_S = 3600.0
TARGET = 2.0
# Its steps take a few milliseconds.
TINY, TINY_JOBS, TINY_STEPS = "tiny-gpt", 5, 400
# In milliseconds, once each.
MEASURED = ("beat", "compare", "save", "exposed", "copies")
# Of each kind of mpirun, what jobs have found.
Jobs = dict[str, list[dict[str, float]]]


def main(words: Sequence[str] = ()) -> int:
    """Start the jobs and print a table; 1 where all of it together costs more than the target."""
    tiny = _alternating(TINY, TINY_JOBS)
    rows, kept = [], {TINY: tiny}
    for name in models.chosen(list(words)):
        kept[name] = _alternating(name, max(2, runner.ROUNDS))
        rows.append(shares(kept[name], tiny))
    print(f"\n{table(list(kept)[1:], rows)}\nin {runner.save('fault-cost', kept)}")
    return int(any(row["together"] > TARGET for row in rows))


def _alternating(name: str, rounds: int) -> Jobs:
    """Jobs without and with ULFM, by turns."""
    found: Jobs = {"plain": [], "ulfm": []}
    for number in range(2 * rounds):
        kind = "ulfm" if number % 2 else "plain"
        print(f"{name}, {kind} ...", flush=True)
        flags = ["--with-ft", "ulfm"] if kind == "ulfm" else []
        by = [own_mpirun(), *flags, "-np", str(RANKS)]
        found[kind].append(runner.measured(RANKS, MODULE, name, kind, folder=FOLDER, by=by))
    return found


def _steps_ms(found: Jobs) -> tuple[float, float]:
    """Of a step without and with ULFM."""
    plain, ulfm = (statistics.median(job["step"] for job in found[kind]) for kind in ("plain", "ulfm"))
    return plain, ulfm


def shares(found: Jobs, tiny: Jobs) -> dict[str, float]:
    """Each cost in percent of a step, from the medians of both kinds of jobs of a model and of a tiny one."""
    step_ms, ulfm_ms = _steps_ms(found)
    tiny_ms, tiny_ulfm_ms = _steps_ms(tiny)
    jobs = found["plain"] + found["ulfm"]
    middle = {key: statistics.median(job[key] for job in jobs) for key in MEASURED}
    cost_s = max(0.0, middle["save"]) / 1e3
    interval_s = math.sqrt(2 * cost_s * FAILS_EVERY_S)
    row = {
        "step ms": step_ms,
        "ulfm": 100 * max(0.0, tiny_ulfm_ms - tiny_ms) / step_ms,
        "ulfm itself": 100 * (ulfm_ms / step_ms - 1),
        "watchdog": 100 * middle["beat"] / 1e3 / jobs[0]["beat_every_s"],
        "check": 100 * middle["compare"] / jobs[0]["check_every"] / step_ms,
        "checkpoint": 100 * cost_s / interval_s if interval_s else 0.0,
    }
    together = row["ulfm"] + row["watchdog"] + row["check"] + row["checkpoint"]
    more = {"save ms": middle["save"], "exposed ms": middle["exposed"], "copies ms": middle["copies"]}
    return row | more | {"together": together, "interval_s": interval_s}


def table(names: Sequence[str], rows: Sequence[dict[str, float]]) -> str:
    """A line for each model, in percent of a step but for what is said otherwise; the interval is Young's."""
    head = [
        "2 ranks, % of a step",
        "step ms",
        "ULFM",
        "(itself)",
        "watchdog",
        "check",
        "a save, ms",
        "(waited)",
        "interval, s",
    ]
    cells = [
        [
            *(
                name,
                f"{row['step ms']:.1f}",
                f"{row['ulfm']:.2f}",
                f"({row['ulfm itself']:+.1f})",
                f"{row['watchdog']:.2f}",
            ),
            *(f"{row['check']:.2f}", f"{row['save ms']:.0f}", f"({row['exposed ms']:.0f})"),
            *(f"{row['interval_s']:.0f}", f"{row['checkpoint']:.2f}", f"{row['together']:.1f}"),
            f"{row['copies ms']:.0f}",
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    return runner.table([*head, "checkpoints", "together", "copies, ms"], cells)


# On the ranks --------------------------------------------------------------------------------------


def on_ranks(name: str, out: Path) -> None:
    """Measure everything; rank 0 leaves the medians in a file."""
    from tf_dist.comm.health import watchdog
    from tf_dist.comm.runtime import launch

    comm = launch.connect()
    from tf_dist.bench.systems import trainer_of
    from tf_dist.training.checkpoint_manager import CheckpointManager
    from tf_dist.training.in_memory_checkpoint import PeerCheckpoints
    from tf_dist.training.snapshot import snapshot_of

    found: dict[str, Any]
    recipe = models.RECIPES[name]
    trainer, sequences, sampler = trainer_of(comm, recipe.sizes, recipe.rows, micro_batches=2)

    def step() -> None:
        trainer.train_step(sequences, sampler)

    if name == TINY:
        found = runner.interleaved(comm, {"step": step}, TINY_STEPS, TINY_STEPS // 10)
        _leave(comm, found, out)
        return
    works = {"step": step, "compare": lambda: trainer.consistency_check.compare(trainer.step)}
    found = runner.interleaved(comm, works, DROPPED + 2 * recipe.steps, DROPPED)
    saver = CheckpointManager(comm, out.with_suffix(""), keep=1)
    count, waited = max(2, round(1e3 * STRETCH_S / found["step"])), list[float]()

    def stretch(save: bool) -> float:
        begun = time.perf_counter()
        if save:
            waited.append(runner.slowest(comm, lambda: saver.begin(snapshot_of(trainer))))
        for _ in range(count):
            step()
        if save:  # all that a save costs, also where it takes longer than the steps
            saver.settle()
        return 1e3 * float(max(comm.allgather_obj(time.perf_counter() - begun)))

    stretch(True)  # which takes memory for the copies
    pairs = [(stretch(False), stretch(True)) for _ in range(PAIRS)]
    found["save"] = statistics.median(saved - calm for calm, saved in pairs)
    found["exposed"] = statistics.median(waited[1:])
    peers = PeerCheckpoints()
    works = {"copies": lambda: peers.save(snapshot_of(trainer))}
    found |= runner.interleaved(comm, works, DROPPED + PAIRS, DROPPED)
    found |= {"beat": launch.beat_ms(), "beat_every_s": watchdog.BEAT_S}
    found["check_every"] = trainer.consistency_check.every
    _leave(comm, found, out)


def _leave(comm: Comm, found: dict[str, Any], out: Path) -> None:
    if comm.rank == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    on_ranks(sys.argv[1], Path(sys.argv[3]))
