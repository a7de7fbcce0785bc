"""Table of targets and measured values from the newest JSON files under runs/bench/, as Markdown.

    python scripts/bench.py --report

Every figure is a ratio of two numbers that were measured in the same run. A target without a file, or
whose peer was not there, has no figure.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tf_dist.bench import nanogpt, runner, step, strategies

STAMP = re.compile(r"\d{8}-\d{6}\.json")
LARGE, SMALL, LSTM = "gpt-10.7M", "gpt-0.81M", "lstm-1.08M"
# Of the sums that the target is about, in bytes.
SUMS = range(4 << 20, (64 << 20) + 1)

Reports = dict[str, dict[str, Any]]
Run = dict[str, Any]


class Target(NamedTuple):
    """What is promised: at least, or at most, a ratio; and how it is read from the reports."""

    name: str
    bound: float
    read: Callable[[Reports], float | None]
    at_most: bool = False
    percent: bool = False

    def met(self, ratio: float) -> bool:
        """Whether a ratio is on the right side."""
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    def shown(self, ratio: float) -> str:
        """A ratio, in the unit of the target."""
        return f"{100 * ratio:.{1 if self.bound < 0.1 else 0}f} %" if self.percent else f"{ratio:.2f}"


def newest(folder: Path = runner.FOLDER) -> Reports:
    """The newest report of each benchmark, by name; of parts that it leaves out, the newest that has them."""
    found: Reports = {}
    for place in sorted(folder.glob("*/")):
        report, sources = dict[str, Any](), dict[str, str]()
        for path in sorted(path for path in place.glob("*.json") if STAMP.fullmatch(path.name)):
            parts = json.loads(path.read_text())
            report |= parts
            sources |= dict.fromkeys(parts, str(path))
        if report:
            found[place.name] = report | {"file": " and ".join(sorted(set(sources.values())))}
    return found


def targets(folder: Path = runner.FOLDER) -> str:
    """The table, and which files it is from."""
    reports = newest(folder)
    lines = ["| ratio in one run | target | reached | |", "|---|---|---|---|"]
    for target in TARGETS:
        sign = "<=" if target.at_most else ">="
        ratio = _read(target, reports)
        reached = "not measured" if ratio is None else target.shown(ratio)
        verdict = "" if ratio is None else "met" if target.met(ratio) else "missed"
        lines.append(f"| {target.name} | {sign} {target.shown(target.bound)} | {reached} | {verdict} |")
    sources = [f"- {name}: {report['file']}, {_machine(report)}" for name, report in reports.items()]
    return "\n".join([*lines, "", *(sources or [f"no reports under {folder}: run `make bench`"])])


def _machine(report: dict[str, Any]) -> str:
    machine = report.get("machine", {})
    return f"{machine.get('cores')} cores of {machine.get('processor')}"


def _read(target: Target, reports: Reports) -> float | None:
    try:
        return target.read(reports)
    except (KeyError, IndexError, TypeError, ZeroDivisionError):
        return None  # a report that is not there, or has no such peer


# How each is read --------------------------------------------------------------------------------


def sums_against_mpi(ranks: int) -> Callable[[Reports], float | None]:
    """The least of MPI's time over ours, over all sizes of the target."""

    def read(reports: Reports) -> float | None:
        job = next(job for job in reports["comm"]["jobs"] if job["ranks"] == ranks)
        sums = [found for found in job["sums"] if found["bytes"] in SUMS]
        return min(float(found["mpi"]) / float(found["ours"]) for found in sums)

    return read


def speed(reports: Reports, model: str, ways: Sequence[str], ranks: int) -> float:
    """The highest tokens per second of some ways; a word matches all ways that begin with it."""
    rows = reports["step"]["models"][model]["rows"]
    speeds = [
        float(row["tokens_per_s"])
        for row in rows
        if row["ranks"] == ranks
        and any(row["way"] == way or row["way"].startswith(f"{way} ") for way in ways)
    ]
    if not speeds:
        raise KeyError(model)
    return max(speeds)


def step_against(
    model: str, peers: Sequence[str], ranks: int = step.RANKS, ours: str = "ours"
) -> Callable[[Reports], float | None]:
    """Our tokens per second over those of the fastest of some peers."""

    def read(reports: Reports) -> float | None:
        rows = reports["step"]["models"][model]["rows"]
        own = next(row for row in rows if row["way"] == ours and row["ranks"] == step.RANKS)
        return float(own["tokens_per_s"]) / speed(reports, model, peers, ranks)

    return read


def bfloat16(reports: Reports) -> float | None:
    """Our speed with bfloat16 over that without."""
    rows = {row["way"]: row for row in reports["step"]["models"][LARGE]["rows"] if row["ranks"] == step.RANKS}
    return float(rows["ours bfloat16"]["tokens_per_s"]) / float(rows["ours"]["tokens_per_s"])


def gemm_share(model: str) -> Callable[[Reports], float | None]:
    """The share of a core's peak in our step, where each rank has one core: one rank alone has them all."""
    most = f"np {step.RANKS}"
    return lambda reports: float(reports["step"]["models"][model]["gemm"][most]["step"])


def time_to_loss(reports: Reports) -> float | None:
    """Ours over PyTorch's, to 1.88 where all runs have reached it, else to the lowest that all have."""
    runs = reports["nanogpt"]["runs"]
    for level in (nanogpt.LEVEL, nanogpt.common_level(runs)):
        times = nanogpt.times_to(runs, level)
        ours, peer = times["ours"], times["torch"]
        if ours and peer:
            return ours / peer
    return None


def network(reports: Reports) -> float | None:
    """Horovod's step over ours on two hosts at 1 Gbit/s."""
    steps = reports["network"]["rates"]["1gbit"]["steps_ms"]
    return float(steps["horovod"]) / float(steps["overlap"])


def learnt(
    model: str, name: str, found: Callable[[Run, Run], float], plain: str = strategies.PLAIN
) -> Callable[[Reports], float | None]:
    """What a strategy's run and that of plain allreduce, on four ranks, say together."""

    def read(reports: Reports) -> float | None:
        jobs = reports["strategies"]["learn"]
        runs = {(job["model"], job["ranks"]): job["runs"] for job in jobs}[model, 4]
        return found(runs[name], runs[plain])

    return read


def fewer(run: Run, plain: Run) -> float:
    """Bytes of plain allreduce over those of a strategy, in a step."""
    return strategies.sent_of_a_step(plain) / strategies.sent_of_a_step(run)


def worse(run: Run, plain: Run) -> float:
    """How much higher a strategy's last validation loss is, as a part."""
    return float(run["points"][-1][3] / plain["points"][-1][3]) - 1.0


def more_perplexed(run: Run, plain: Run) -> float:
    """The same of perplexities."""
    return math.exp(run["points"][-1][3] - plain["points"][-1][3]) - 1.0


def between_hosts(rate: str, names: Sequence[str], peer: str) -> Callable[[Reports], float | None]:
    """Speed of the fastest of some strategies over that of another one, or of computing alone."""

    def read(reports: Reports) -> float | None:
        runs = reports["strategies"]["hosts"][rate]
        taken = sorted(float(runs[name]["step_ms"]) for name in names if name in runs)
        return float(runs[peer]["step_ms"]) / taken[0]

    return read


def beside_a_slow_rank(reports: Reports) -> float | None:
    """Downpour's speed over that of plain allreduce."""
    runs = reports["strategies"]["slow"]
    return float(runs[strategies.PLAIN]["slow_ms"]) / float(runs["downpour 4"]["slow_ms"])


def _of_strategies() -> Iterator[Target]:
    # At the settings of plain allreduce: what is tuned has another learning rate.
    few, best = "diloco 50", "diloco 50 delayed"
    yield Target("DiLoCo H=50, np 4: bytes of allreduce / its bytes", 40.0, learnt(SMALL, few, fewer))
    gap = learnt(SMALL, few, worse)
    yield Target("DiLoCo H=50, np 4: loss above that of allreduce", 0.01, gap, at_most=True, percent=True)
    smaller = learnt(LSTM, "powersgd 4", fewer)
    yield Target("PowerSGD rank 4, LSTM, np 4: bytes of allreduce / its bytes", 30.0, smaller)
    gap = learnt(LSTM, "powersgd 4", more_perplexed)
    yield Target("PowerSGD rank 4, LSTM, np 4: perplexity above", 0.01, gap, at_most=True, percent=True)
    gap = learnt(LSTM, "powersgd 4 momentum", more_perplexed, plain="allreduce momentum")
    yield Target("the same, with SGD: perplexity above", 0.01, gap, at_most=True, percent=True)
    slowest = between_hosts("100mbit", [best], "compute alone")
    yield Target("two hosts at 100 Mbit/s, GPT 10.7 M: DiLoCo, delayed / compute alone", 0.95, slowest)
    compressed = [name for name, way in strategies.NAMES.items() if "compression" in way.options]
    ratio = between_hosts("1gbit", compressed, strategies.PLAIN)
    yield Target("two hosts at 1 Gbit/s, GPT 10.7 M: best compressed / plain sums", 2.0, ratio)
    yield Target("np 4, one rank 2x slower: downpour / allreduce", 1.3, beside_a_slow_rank)


def _all() -> Iterator[Target]:
    for ranks in (2, 4):
        yield Target(f"window allreduce / MPI `Allreduce`, 4-64 MB, np {ranks}", 4.0, sums_against_mpi(ranks))
    names = {LARGE: "GPT 10.7 M", SMALL: "GPT 0.81 M", LSTM: "LSTM 1.08 M"}
    for model, name in names.items():
        yield Target(f"{name}: np 2 / compute only", 0.98, step_against(model, step.CEILINGS))
    # Each model has its bounds against Keras (for the small one also with XLA), Horovod and DDP.
    for model, keras, horovod, ddp in (
        (LARGE, 1.25, 1.4, 1.2),
        (SMALL, 1.3, 2.0, 1.3),
        (LSTM, 2.0, 2.5, 1.1),
    ):
        name = names[model]
        fits = ("fit plain", "fit xla") if model == SMALL else ("fit plain",)
        yield Target(
            f"{name}: np 2 / Keras in one process{', also with XLA' * (model == SMALL)}",
            keras,
            step_against(model, fits, ranks=0),
        )
        if model == SMALL:
            xla = step_against(model, fits, ranks=0, ours="ours xla")
            yield Target(f"{name}: np 2 with `--xla on` / Keras in one process", keras, xla)
        yield Target(f"{name}: np 2 / Horovod, defaults or best", horovod, step_against(model, ("horovod",)))
        yield Target(f"{name}: np 2 / PyTorch DDP", ddp, step_against(model, ("ddp",)))
    yield Target("bfloat16 / float32, GPT 10.7 M", 1.5, bfloat16)
    yield Target("nanoGPT recipe: time to 1.88 / PyTorch's", 0.65, time_to_loss, at_most=True)
    yield Target("two hosts at 1 Gbit/s, GPT 10.7 M: np 2 / Horovod", 1.3, network)
    yield Target("LSTM: share of the GEMM peak", 0.85, gemm_share(LSTM), percent=True)
    yield Target("GPT 10.7 M: share of the GEMM peak", 0.80, gemm_share(LARGE), percent=True)
    yield from _of_strategies()


TARGETS = tuple(_all())
