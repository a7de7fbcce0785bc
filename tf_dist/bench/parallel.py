"""Every grid of 2 and 4 ranks on one model: tokens/s, communication, memory, bubbles, and their formulas.

    python scripts/bench.py parallel             # one node, and two emulated hosts where that can be
    python scripts/bench.py parallel one-node    # or hosts, zero (bytes per parameter), rows (long ones)

A Transformer of 6.4 million parameters, the same 16 rows of 128 tokens in each step, in 8 micro-batches. A
job is one grid. It trains a tiny model in the same way first, whose memory is the baseline; then the model,
in steps that are timed; then once more with sums by messages, so that bytes can be counted. With more ranks
than cores (marked by a star) times say how much work there is in all, and nothing about speed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tf_dist.bench import long_rows, memory, models, network, plots, runner, zero_memory
from tf_dist.parallel import cost_model

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm

MODULE = "tf_dist.bench.parallel"
FOLDER = runner.FOLDER / "parallel"
SIZES: dict[str, Any] = {"model": "transformer", "layers": 8, "width": 256, "heads": 8, "seq_len": 128}
# For the baseline: as many layers and heads, so that it can be divided in the same ways.
TINY: dict[str, Any] = {"model": "transformer", "layers": 8, "width": 16, "heads": 8, "seq_len": 16}
ROWS, MICRO_BATCHES, VIRTUAL_STAGES = 2, 8, 2
WARM_UP, STEPS, COUNTED = 2, 6, 2
RATE = "1gbit"
PARTS = ("one-node", "hosts", "zero", "rows")


class GridOption(NamedTuple):
    """A grid and how it is used; data is what is left of the ranks."""

    pipeline: int = 1
    sequence: int = 1
    tensor: int = 1
    zero: int = 0
    schedule: str = "1f1b"

    def shape(self, ranks: int) -> tuple[int, int, int, int]:
        """Ranks along data, pipeline, sequence and tensor."""
        each = self.pipeline * self.sequence * self.tensor
        return ranks // each, self.pipeline, self.sequence, self.tensor

    def name(self, ranks: int) -> str:
        """For people."""
        named = zip(("data", "pipeline", "sequence", "tensor"), self.shape(ranks), strict=True)
        words = " x ".join(f"{axis} {n}" for axis, n in named if n > 1)
        zero = f", ZeRO {self.zero}" if self.zero else ""
        return words + (f", {self.schedule}" if self.pipeline > 1 else "") + zero

    @property
    def word(self) -> str:
        """For a command line."""
        return "_".join(map(str, self))


def of_word(word: str) -> GridOption:
    """The way that has this word."""
    *numbers, schedule = word.split("_")
    pipeline, sequence, tensor, zero = map(int, numbers)
    return GridOption(pipeline, sequence, tensor, zero, schedule)


SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
WAYS = {
    2: (
        *(GridOption(zero=stage) for stage in range(4)),
        GridOption(tensor=2),
        *(GridOption(pipeline=2, schedule=schedule) for schedule in SCHEDULES),
        GridOption(sequence=2),
    ),
    4: (
        *(GridOption(zero=stage) for stage in range(4)),
        GridOption(tensor=2),
        GridOption(tensor=2, zero=1),
        GridOption(tensor=4),
        GridOption(pipeline=2),
        GridOption(pipeline=2, zero=1),
        *(GridOption(pipeline=4, schedule=schedule) for schedule in SCHEDULES),
        GridOption(pipeline=2, tensor=2),
        GridOption(sequence=2),
        GridOption(sequence=4),
        GridOption(sequence=2, tensor=2),
    ),
}
ON_HOSTS = {
    2: (
        GridOption(),
        GridOption(zero=1),
        GridOption(zero=3),
        GridOption(tensor=2),
        GridOption(pipeline=2),
        GridOption(sequence=2),
    ),
    4: (
        GridOption(),
        GridOption(zero=1),
        GridOption(tensor=2),
        GridOption(pipeline=2),
        GridOption(pipeline=2, tensor=2),
        GridOption(sequence=2),
    ),
}


def main(words: Sequence[str] = ()) -> int:
    """Start the jobs of the parts that are named, or of all; tables, a JSON file and a picture."""
    unknown = [word for word in words if word not in PARTS]
    if unknown:
        raise SystemExit(f"error: no part {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    wanted = words or PARTS
    report: dict[str, Any] = {"sizes": SIZES, "rows": ROWS, "micro_batches": MICRO_BATCHES}
    if "one-node" in wanted:
        report["one node"] = measured(WAYS)
        print(f"\none node\n{table(report['one node'])}\n", flush=True)
    if "hosts" in wanted and (by := hosts_command()):
        report[f"two hosts at {RATE}"] = measured(ON_HOSTS, by)
        print(f"\ntwo hosts at {RATE}\n{table(report[f'two hosts at {RATE}'])}\n", flush=True)
    if "zero" in wanted:
        report["zero"] = zero_part()
    if "rows" in wanted:
        report["rows"] = rows_part()
    path = runner.save("parallel", report)
    print(f"in {path}")
    if drawn := picture(report, path.with_suffix(".png")):
        print(f"and {drawn}")
    return 0


def zero_part() -> list[dict[str, Any]]:
    """Bytes for each parameter with each of ZeRO's stages."""
    jobs = []
    for ranks in (2, 4):
        for way in zero_memory.WAYS:
            print(f"memory of {way} on {ranks} ranks ...", flush=True)
            jobs.append(zero_memory.measured(way, ranks, FOLDER))
    print(f"\n{zero_memory.table(jobs)}\n", flush=True)
    return jobs


def rows_part() -> list[dict[str, Any]]:
    """Memory and time of long rows."""
    print("long rows ...", flush=True)
    jobs = long_rows.measure()
    print(f"\n{long_rows.table(jobs)}\n", flush=True)
    return jobs


def hosts_command() -> list[str]:
    """What starts ranks on two hosts; nothing, with a word about it, where that cannot be."""
    command = [sys.executable, str(network.CLUSTER)]
    check = subprocess.run([*command, "--check"], capture_output=True, text=True)
    if check.returncode in network.NOT_HERE:
        print(f"two hosts are skipped: {check.stderr.strip()}")
        return []
    return [*command, "--hosts", "2", "--rate", RATE]


def measured(systems: Mapping[int, Sequence[GridOption]], by: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A job for each way and round; of each way the medians of all rounds."""
    found: dict[tuple[int, GridOption], list[dict[str, Any]]] = {}
    for _ in range(runner.ROUNDS):
        for ranks, of_ranks in systems.items():
            start = [*by, "--slots", str(ranks // 2), "--"] if by else []
            for way in of_ranks:
                print(f"{way.name(ranks)} ...", flush=True)
                job = runner.measured(ranks, MODULE, way.word, folder=FOLDER, by=start)
                found.setdefault((ranks, way), []).append(job)
    return [summary(ranks, way, jobs) for (ranks, way), jobs in found.items()]


def summary(ranks: int, way: GridOption, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """One way: medians over rounds, beside what the formulas say."""
    step_ms = statistics.median(time_ms for job in jobs for time_ms in job["steps_ms"])
    tokens = ROWS * MICRO_BATCHES * SIZES["seq_len"]
    shape = way.shape(ranks)
    by_formula = cost_model.of_grid(
        sizes_of(jobs[0]["parameters"]),
        MICRO_BATCHES,
        shape,
        stage=way.zero,
        schedule=way.schedule,
        virtual_stages=VIRTUAL_STAGES if way.schedule == "interleaved" else 1,
    )
    return {
        "name": way.name(ranks),
        "ranks": ranks,
        "way": way._asdict(),
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * tokens / step_ms,
        **{key: statistics.median(job[key] for job in jobs) for key in MEDIANS},
        "sent_formula": by_formula.gradient_bytes + by_formula.activation_bytes_sent,
        "held_formula": by_formula.state_bytes + by_formula.activation_bytes,
        "bubble_formula": by_formula.bubble,
    }


MEDIANS = ("talk_ms", "sent", "held", "bubble")


def sizes_of(parameters: int) -> cost_model.Sizes:
    """The model, as the formulas want it."""
    shape = {key: int(SIZES[key]) for key in ("layers", "width", "heads", "seq_len")}
    return cost_model.Sizes(parameters=parameters, vocabulary=models.VOCABULARY, rows=ROWS, **shape)


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each way; what was counted beside what the formula says."""
    plain = {row["ranks"]: row["tokens_per_s"] for row in rows if row["name"] == f"data {row['ranks']}"}
    head = [
        "grid", "np", "tokens/s", "it / data", "talk ms", "sent MB", "formula", "held MB", "formula",
        "bubble", "formula",
    ]  # fmt: skip
    cells = []
    for row in rows:
        waits = row["way"]["pipeline"] > 1
        cells.append(
            [
                row["name"],
                runner.ranks_named(row["ranks"]),
                f"{row['tokens_per_s']:,.0f}",
                f"{row['tokens_per_s'] / plain[row['ranks']]:.2f}",
                f"{row['talk_ms']:.0f}",
                *(f"{memory.MB * row[key]:.1f}" for key in ("sent", "sent_formula")),
                *(f"{memory.MB * row[key]:.0f}" for key in ("held", "held_formula")),
                *(f"{100 * row[key]:.0f} %" if waits else "" for key in ("bubble", "bubble_formula")),
            ]
        )
    return runner.table(head, cells)


def picture(report: dict[str, Any], path: Path) -> Path | None:
    """Tokens per second of every grid, a panel for each number of ranks and hosts; None without any."""
    panels = []
    for where in ("one node", f"two hosts at {RATE}"):
        rows = report.get(where, [])
        for ranks in sorted({row["ranks"] for row in rows}):
            these = [row for row in rows if row["ranks"] == ranks]
            crowded = " on fewer cores" if ranks > (os.cpu_count() or 1) else ""
            labels = [row["name"] for row in these]
            speeds = [row["tokens_per_s"] for row in these]
            title = f"{where}, {ranks} ranks{crowded}"
            panels.append(plots.Bars(title, labels, speeds, [True] * len(these)))
    return plots.bars(path, "tokens per second", panels) if panels else None


# On the ranks ------------------------------------------------------------------------------------


def main_on_ranks(word: str, out: Path) -> None:
    """Train in one way; rank 0 writes what was found."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect()
    from tf_dist.layers import mappings

    way = of_word(word)
    baseline = BenchRun(comm, way, TINY).peak_pss()
    run = BenchRun(comm, way, SIZES)
    found: dict[str, Any] = {"steps_ms": run.steps_ms(), "talk_ms": run.talk_ms(), "bubble": run.bubble()}
    held = comm.allgather_obj(run.peak_pss() - baseline)
    found |= {"held": max(held), "held_of_ranks": held, "parameters": run.parameters()}
    del run
    mappings.WINDOW_FROM = 1 << 62
    sent = comm.allgather_obj(BenchRun(comm, way, SIZES, allreduce="messages").sent_bytes())
    found |= {"sent": max(sent), "sent_of_ranks": sent}
    if comm.rank == 0:
        out.write_text(json.dumps(found))


class BenchRun:
    """A trainer of a way, warmed up.

    Args:
        comm: all ranks.
        way: the grid.
        sizes: of the model.
        options: more for the Trainer.
    """

    def __init__(self, comm: Comm, way: GridOption, sizes: dict[str, Any], **options: Any) -> None:
        from tf_dist.bench import systems

        self.comm, self.way = comm, way
        zero: dict[str, Any] = {"update": "zero" if way.zero else "allreduce", "zero_stage": max(1, way.zero)}
        degrees = {
            "pipeline_parallel": way.pipeline,
            "sequence_parallel": way.sequence,
            "tensor_parallel": way.tensor,
        }
        self.trainer, sequences, sampler = systems.trainer_of(
            comm,
            {**sizes, **degrees, **zero},
            ROWS * MICRO_BATCHES // comm.size,
            MICRO_BATCHES // comm.size,
            check_every=0,
            pipeline={"pipeline_schedule": way.schedule, "virtual_stages": VIRTUAL_STAGES},
            **zero,
            **options,
        )
        self._data = sequences, sampler
        self.trainer.tune()
        self._talk_ms: list[float] = []
        self._bubbles: list[float] = []
        for _ in range(WARM_UP + 2):  # the first steps are compared by the consistency check
            self._step()

    def _step(self) -> None:
        before = self.comm.comm_s + self.comm.wait_s
        self.trainer.train_step(*self._data)
        self._talk_ms.append(1e3 * (self.comm.comm_s + self.comm.wait_s - before))
        spent = getattr(self.trainer.runner, "spent", None)
        self._bubbles.append(spent.waited_s / spent.elapsed_s if spent and spent.elapsed_s else 0.0)

    def steps_ms(self) -> list[float]:
        """Milliseconds of steps, each of the slowest rank."""
        return [runner.slowest(self.comm, self._step) for _ in range(STEPS)]

    def talk_ms(self) -> float:
        """Median milliseconds of a step in which this rank talks or waits; the mean over ranks."""
        return self._mean(statistics.median(self._talk_ms[-STEPS:]))

    def bubble(self) -> float:
        """The median share of its passes in which a rank of a pipeline waits; the mean over ranks."""
        return self._mean(statistics.median(self._bubbles[-STEPS:]))

    def _mean(self, value: float) -> float:
        return float(sum(self.comm.allgather_obj(value)) / self.comm.size)

    def sent_bytes(self) -> float:
        """Bytes that this rank sends in a step."""
        before = self.comm.sent_bytes
        for _ in range(COUNTED):
            self._step()
        return (self.comm.sent_bytes - before) / COUNTED

    def peak_pss(self) -> int:
        """The peak of PSS of this rank over some steps."""
        self.comm.barrier()
        with memory.Watch() as watch:
            for _ in range(COUNTED + 1):
                self._step()
        self.comm.barrier()
        return watch.peak_pss

    def parameters(self) -> int:
        """Of the whole model."""
        return sum(prod(entry.shape) for entry in self.trainer.whole().weights)


if __name__ == "__main__":
    main_on_ranks(sys.argv[1], Path(sys.argv[2]))
