"""Every strategy and compressor: validation loss over steps, time and bytes; slow networks, a slow rank.

    python scripts/bench.py strategies            # learn, hosts and slow, about an hour
    python scripts/bench.py strategies learn lstm-1.08M steps=300 ranks=4 only=allreduce,diloco-50
    python scripts/bench.py strategies hosts      # or slow: one rank that takes twice as long

``learn`` trains tinyshakespeare's characters on 2 and 4 ranks of this machine, each strategy in a job of its
own, with the same rows in the same order. ``hosts`` times steps of a larger model on two emulated hosts: what
a strategy learns does not depend on the network, but for downpour. ``slow`` lets the last rank sleep as long
as it computes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tf_dist.bench import memory, models, network, plots, runner
from tf_dist.bench.nanogpt import TEXTS

MODULE = "tf_dist.bench.strategies_on_ranks"
FOLDER = runner.FOLDER / "strategies"
WHAT = "what.json"
PARTS = ("learn", "hosts", "slow")
LEARNT, TIMED, SLOWED = ("gpt-0.81M", "lstm-1.08M"), "gpt-10.7M", "gpt-0.81M"
RANKS, HOSTS, RATES = (2, 4), 2, ("1gbit", "100mbit")
# Of all ranks, in a step; so that four ranks have a micro-batch each.
ROWS = {"gpt-0.81M": 12, "lstm-1.08M": 32, "gpt-10.7M": 8, "tiny-gpt": 4, "tiny-lstm": 4}
MICRO_BATCHES = 4
# rows: of all ranks; 0: as above.
OPTIONS = {"steps": 500, "every": 100, "ranks": 0, "rows": 0}
# Options about the first steps of a training.
FIRST = ("sync_warmup_steps", "compression_start")


class MeasuredStrategy(NamedTuple):
    """A strategy with its options, by the names of `tf_dist.config.Config`."""

    strategy: str = "allreduce"
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


# For short runs: the momentum of the paper is for hundreds of meetings, and Adam of one replica takes
# shorter steps than that of all, for its gradients have more noise.
TUNED = {"learning_rate": 3e-3, "outer_lr": 1.0, "outer_momentum": 0.5}
# What PowerSGD was made for: what comes late is added. AdamW divides it by a variance that it made larger.
MOMENTUM = {
    "optimizer": "sgd",
    "optimizer_args": {"momentum": 0.9, "nesterov": True},
    "learning_rate": 3.0,
    "min_learning_rate": 0.3,
    "weight_decay": 0.0,
}
NAMES = {
    "allreduce": MeasuredStrategy(),
    "allreduce 3x rate": MeasuredStrategy(options={"learning_rate": 3e-3}),
    "bf16": MeasuredStrategy(options={"compression": "bf16"}),
    "powersgd 4": MeasuredStrategy(options={"compression": "powersgd", "compression_start": 10}),
    "allreduce momentum": MeasuredStrategy(options=MOMENTUM),
    "powersgd 4 momentum": MeasuredStrategy(
        options={"compression": "powersgd", "compression_start": 200, **MOMENTUM}
    ),
    "onebit": MeasuredStrategy(options={"compression": "onebit", "compression_start": 100}),
    "topk 1 %": MeasuredStrategy(options={"compression": "topk", "compression_start": 10}),
    "local-sgd 8": MeasuredStrategy("local-sgd", {"sync_every": 8}),
    "diloco 50": MeasuredStrategy("diloco", {"sync_every": 50}),
    "diloco 50 tuned": MeasuredStrategy("diloco", {"sync_every": 50, **TUNED}),
    "diloco 50 delayed": MeasuredStrategy(
        "diloco", {"sync_every": 50, "outer_fragments": 2, "outer_delay": 10, **TUNED}
    ),
    "easgd 4": MeasuredStrategy("easgd", {"sync_every": 4, "master_trains": "on"}),
    "gossip 1": MeasuredStrategy("gossip", {"sync_every": 1}),
    "downpour 0": MeasuredStrategy("downpour", {"staleness": 0, "master_trains": "on"}),
    "downpour 4": MeasuredStrategy("downpour", {"staleness": 4, "master_trains": "on"}),
}
PLAIN = "allreduce"


def main(words: Sequence[str] = ()) -> int:
    """Start the jobs of the parts that are named, or of all; tables, a JSON file and a picture."""
    options, parts, chosen, only = dict(OPTIONS), [], [], list[str]()
    for word in words:
        key, equals, value = word.partition("=")
        if key == "only":
            only = value.replace("-", " ").split(",")
        elif equals and key in options:
            options[key] = int(value)
        elif word in PARTS:
            parts.append(word)
        else:
            chosen += models.chosen([word])
    text = next((path for path in TEXTS if path.is_file()), None)
    if text is None:
        print(f"bench-strategies: skipped, for there is no text: none of {', '.join(map(str, TEXTS))}")
        return 0
    names = [name for name in NAMES if not only or name == PLAIN or name.replace("-", " ") in only]
    what = {"text": str(text), "names": names, **options}
    report: dict[str, Any] = {"text": text.name, "options": options}
    if "learn" in (parts or PARTS):
        report["learn"] = [
            learnt(ranks, model, what)
            for model in chosen or LEARNT
            for ranks in ([options["ranks"]] if options["ranks"] else RANKS)
        ]
    if "hosts" in (parts or PARTS):
        report["hosts"] = timed_on_hosts(what)
    if "slow" in (parts or PARTS):
        print("one slow rank ...", flush=True)
        report["slow"] = job(4, "slow", SLOWED, what)
        print(f"\n{slow_table(report['slow'])}\n", flush=True)
    path = runner.save("strategies", report)
    print(f"in {path}")
    for found in report.get("learn", []):
        drawn = path.with_name(f"{path.stem}-{found['model']}-{found['ranks']}.png")
        print(f"and {picture(found, drawn)}")
    return 0


def job(ranks: int, kind: str, model: str, what: dict[str, Any], *more: str, by: Sequence[str] = ()) -> Any:
    """Start a job, which finds in a file what it is to do: the path of a text is no part of a file's name."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / WHAT).write_text(json.dumps(what))
    return runner.measured(ranks, MODULE, kind, model, *more, folder=FOLDER, by=by)


def learnt(ranks: int, model: str, what: dict[str, Any]) -> dict[str, Any]:
    """Train a model by each strategy, in a job of its own: memory of one would be used again by the next."""
    print(f"{model} on {ranks} ranks ...", flush=True)
    runs = {name: job(ranks, "learn", model, what | {"names": [name]})[name] for name in what["names"]}
    found = {"ranks": ranks, "model": model, "runs": runs}
    print(f"\n{learn_table(found)}\n{masters(found)}", flush=True)
    return found


def timed_on_hosts(what: dict[str, Any]) -> dict[str, Any]:
    """Time each strategy's steps between two hosts."""
    command = [sys.executable, str(network.CLUSTER)]
    check = subprocess.run([*command, "--check"], capture_output=True, text=True)
    if check.returncode in network.NOT_HERE:
        print(f"two hosts are skipped: {check.stderr.strip()}")
        return {}
    found = {}
    for rate in RATES:
        print(f"two hosts at {rate} ...", flush=True)
        by = [*command, "--hosts", str(HOSTS), "--rate", rate, "--"]
        found[rate] = job(HOSTS, "hosts", TIMED, what, rate, by=by)
        print(f"\n{hosts_table(rate, found[rate])}\n", flush=True)
    return found


# What is shown -------------------------------------------------------------------------------------


def learn_table(job: dict[str, Any]) -> str:
    """A line for each strategy; losses beside that of plain allreduce.

    The speed of convergence: steps and seconds to the loss that plain allreduce has halfway.
    """
    runs = job["runs"]
    plain = runs[PLAIN]["points"][-1]
    halfway = runs[PLAIN]["points"][(len(runs[PLAIN]["points"]) - 1) // 2][3]
    rows = []
    for name, run in runs.items():
        _, seconds, _, loss = run["points"][-1]
        sent, there = sent_of_a_step(run), reached(run["points"], halfway)
        rows.append(
            [
                name,
                f"{loss:.4f}",
                f"{100 * (loss / plain[3] - 1):+.1f} %",
                f"{100 * run['val_accuracy']:.1f} %",
                f"{there[0]:.0f}" if there else "",
                f"{there[1]:.1f}" if there else "",
                f"{seconds:.1f}",
                f"{run['tokens'] / seconds:,.0f}",
                f"{memory.MB * sent:.3f}",
                f"{sent_of_a_step(runs[PLAIN]) / sent:.1f}" if sent else "",
                f"{memory.MB * run['added_pss']:.0f}",
            ]
        )
    head = [
        f"{job['model']}, {runner.ranks_named(job['ranks'])} ranks", "val loss", "gap", "accuracy",
        f"steps to {halfway:.2f}", "s to it", "train s", "tokens/s", "sent MB/step", "fewer", "memory MB",
    ]  # fmt: skip
    return runner.table(head, rows)


def reached(points: Sequence[Sequence[float]], loss: float) -> tuple[float, float] | None:
    """After how many steps and seconds a validation loss was reached, on straight lines between points."""
    for before, after in zip([points[0], *points], points, strict=False):
        if after[3] <= loss:
            part = (before[3] - loss) / (before[3] - after[3]) if before[3] > after[3] else 0.0
            steps, seconds = (before[i] + part * (after[i] - before[i]) for i in (0, 1))
            return steps, seconds
    return None


def masters(job: dict[str, Any]) -> str:
    """For how many workers each master would be at work all the time, from its work for those that it had.

    By formula: a worker asks once in the time u of a unit; its push and its answer keep the master busy for
    b, two copies of all weights and an optimizer step. So u / b workers keep it busy.
    """
    lines = []
    for name, run in job["runs"].items():
        if "master" in run:
            load, workers = run["master"]["master_load"], max(1, job["ranks"] - 1)
            busy_ms = 1e3 * load / run["master"]["updates_per_s"]
            lines.append(
                f"{name}: the master is at work {100 * load:.0f} % of the time with {workers} workers, "
                f"{busy_ms:.1f} ms for each push: {workers / load:.0f} workers would keep it busy\n"
            )
    return "".join(lines)


def sent_of_a_step(run: dict[str, Any]) -> float:
    """Bytes after the first steps, in which strategies may do something else."""
    before, last = run["points"][-2:]
    return float((last[2] - before[2]) / (last[0] - before[0]))


def hosts_table(rate: str, runs: dict[str, Any]) -> str:
    """Tokens per second over a network; the ratios last."""
    plain, alone = runs[PLAIN]["step_ms"], runs["compute alone"]["step_ms"]
    rows = [
        [
            name,
            f"{run['step_ms']:.0f}",
            f"{run['tokens'] / run['step_ms'] * 1e3:,.0f}",
            f"{memory.MB * run['sent']:.2f}",
            f"{plain / run['step_ms']:.2f}",
            f"{alone / run['step_ms']:.2f}",
        ]
        for name, run in runs.items()
    ]
    head = [f"{TIMED}, two hosts at {rate}", "ms", "tokens/s", "sent MB", "to allreduce", "to compute alone"]
    return runner.table(head, rows)


def slow_table(runs: dict[str, Any]) -> str:
    """Tokens per second with all ranks alike, and with the last one slowed down."""
    plain = runs[PLAIN]["slow_ms"]
    rows = [
        [
            name,
            *(f"{run['tokens'] / run[key] * 1e3:,.0f}" for key in ("even_ms", "slow_ms")),
            f"{plain / run['slow_ms']:.2f}",
        ]
        for name, run in runs.items()
    ]
    head = [f"{SLOWED}, {runner.ranks_named(4)} ranks, tokens/s", "even", "one slow", "to allreduce"]
    return runner.table(head, rows)


def picture(job: dict[str, Any], path: Path) -> Path:
    """Validation loss over steps, seconds and bytes, a line for each strategy."""
    title = f"{job['model']}, {job['ranks']} ranks"
    axes = (("steps", 0, 1.0), ("seconds of training", 1, 1.0), ("MB sent by a rank", 2, memory.MB))
    panels = []
    for axis, column, scale in axes:
        drawn = {
            name: [(scale * point[column], point[3]) for point in run["points"] if point[column] > 0]
            for name, run in job["runs"].items()
        }
        drawn = {name: points for name, points in drawn.items() if points}
        if drawn:
            panels.append(plots.Lines(title, axis, "validation loss", drawn, log="x" * (column == 2)))
    return plots.lines(path, panels)
