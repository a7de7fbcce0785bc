"""Time to a validation loss: nanoGPT's CPU recipe on tinyshakespeare, against PyTorch on all cores.

    tf-dist bench nanogpt                    # two rounds, some ten minutes
    tf-dist bench nanogpt text.txt steps=100 every=25 rounds=1

Ours is ``tf-dist train --config nanogpt`` on two ranks; PyTorch's is
`torch_nanogpt`: the same model, optimizer, schedule, rows and steps, and the same held-out text. They run one
after the other, by turns, each round with another seed. Counted is the time of training: all steps, with
what the first of them compiles, but neither evaluations nor what comes before the first step, which is shown
apart.

Between two evaluations the loss is taken to fall in a straight line. Whether 1.88 (the published figure) is
reached within the recipe's 2,000 steps differs from seed to seed by some thousandths: the table also shows
the lowest loss that all runs have reached.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tf_dist.bench import plots, runner
from tf_dist.invocation import command as program
from tf_dist.ops.supervisor import own_mpirun

FOLDER = runner.FOLDER / "nanogpt"
TEXTS = (Path("../shared/data/tinyshakespeare.txt"), Path("data/downloads/tinyshakespeare/train.txt"))
TORCH_MODULE = "tf_dist.bench.torch_nanogpt"
RANKS = 2
LEVEL = 1.88
OPTIONS = {"steps": 2000, "every": 250, "rounds": runner.ROUNDS}
NAMES = {"ours": f"tf_dist, {RANKS} ranks", "torch": "PyTorch, one process"}

Point = Sequence[float]  # step, seconds of training, validation loss


def main(words: Sequence[str] = ()) -> int:
    """Train by turns; print when each reached the loss."""
    options, paths = dict(OPTIONS), []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in options:
            options[key] = int(value)
        else:
            paths.append(Path(word))
    text = next((path for path in [*paths, *TEXTS] if path.is_file()), None)
    if text is None:
        print(
            f"bench-nanogpt: skipped, for there is no text: none of {', '.join(map(str, [*paths, *TEXTS]))}. "
            f"`{program('prepare')} tinyshakespeare` downloads it, or name a file: "
            "make bench-nanogpt ARGS=text.txt"
        )
        return 0
    found = measure(text, options)
    print(f"\n{tables(found)}")
    path = runner.save("nanogpt", {"text": text.name, "options": options, **found})
    print(f"\nin {path}\nand {picture(found, path.with_suffix('.png'))}")
    return 0


def measure(text: Path, options: dict[str, int]) -> dict[str, Any]:
    """All rounds, ours and PyTorch's by turns."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "torch": []}
    absent = ""
    for seed in range(1, options["rounds"] + 1):
        print(f"tf_dist, round {seed} of {options['rounds']} ...", flush=True)
        runs["ours"].append(ours(text, seed, options["steps"], options["every"]))
        try:
            python = runner.torch_python()
            print(f"PyTorch, round {seed} of {options['rounds']} ...", flush=True)
            runs["torch"].append(torch(python, text, seed, options["steps"], options["every"]))
        except runner.Absent as reason:
            absent = str(reason)
    return {"runs": {name: found for name, found in runs.items() if found}, "absent": absent}


def ours(text: Path, seed: int, steps: int, every: int) -> dict[str, Any]:
    """A run of ``tf-dist train``, read from its folder."""
    folder = FOLDER / f"run-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        own_mpirun(),
        "-np",
        str(RANKS),
        sys.executable,
        "-m",
        "tf_dist",
        "train",
        "--config",
        "nanogpt",
    ]
    command += ["--data", str(text), "--seed", str(seed), "--run-dir", str(folder), "--progress", "none"]
    command += ["--steps", str(steps), "--eval-every", str(every), "--save-every", "0"]
    command += ["--log-every", str(every)]  # so that each evaluation has the time of its step beside it
    begun_at = time.time()
    runner.run(command, FOLDER / f"ours-{seed}.log")
    ended_at = time.time()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [[row["step"], row["elapsed_s"], row["val_loss"]] for row in rows if "val_loss" in row]
    first_step_at = (folder / "config.yaml").stat().st_mtime  # written just before it
    return {"points": points, "startup_s": first_step_at - begun_at, "whole_s": ended_at - begun_at}


def torch(python: str, text: Path, seed: int, steps: int, every: int) -> dict[str, Any]:
    """A run of `torch_nanogpt`."""
    begun_at = time.time()
    words = (str(text), str(steps), str(every), str(seed))
    out = FOLDER / f"torch-{seed}.json"
    runner.run([python, "-m", TORCH_MODULE, *words, str(out)], FOLDER / f"torch-{seed}.log")
    found: dict[str, Any] = json.loads(out.read_text())
    found["startup_s"] = found.pop("begun_at") - begun_at
    return found | {"whole_s": time.time() - begun_at}


# What is shown -----------------------------------------------------------------------------------


def reached_s(points: Sequence[Point], level: float) -> float | None:
    """Seconds of training after which the loss first was ``level``, on a line between evaluations; or None.

    Before the first evaluation nothing is known of the loss: where that is below already, its time counts.
    """
    before: Point | None = None
    for point in points:
        if point[2] <= level:
            if before is None:
                return float(point[1])
            share = (before[2] - level) / (before[2] - point[2])
            return float(before[1] + share * (point[1] - before[1]))
        before = point
    return None


def common_level(runs: dict[str, list[dict[str, Any]]]) -> float:
    """The lowest loss that every run has reached."""
    return max(min(float(point[2]) for point in run["points"]) for found in runs.values() for run in found)


def times_to(runs: dict[str, list[dict[str, Any]]], level: float) -> dict[str, float | None]:
    """Median seconds to a loss for each side; None where a run has not reached it."""
    found: dict[str, float | None] = {}
    for name, several in runs.items():
        times = [reached_s(run["points"], level) for run in several]
        known = [time for time in times if time is not None]
        found[name] = statistics.median(known) if len(known) == len(times) else None
    return found


def tables(found: dict[str, Any]) -> str:
    """Seconds to each loss, the ratio last; then what is not counted in them."""
    runs = found["runs"]
    common = common_level(runs)
    levels = {f"{LEVEL}": LEVEL, f"{common:.4f}, which all reached": common}
    rows = []
    for name, level in levels.items():
        rows.append([f"loss of {name}", *_times(times_to(runs, level))])
    ends = {
        name: statistics.median(run["points"][-1][1] for run in several) for name, several in runs.items()
    }
    rows.append(["all steps", *_times(ends)])
    head = ["seconds of training to a", *(NAMES[name] for name in runs), "ours / PyTorch"]
    cells = []
    for name, several in runs.items():
        losses = ", ".join(f"{run['points'][-1][2]:.4f}" for run in several)
        numbers = [statistics.median(run[key] for run in several) for key in ("startup_s", "whole_s")]
        cells.append([NAMES[name], losses, *(f"{number:.1f}" for number in numbers)])
    apart = runner.table(["", "last loss of each round", "start-up s", "whole command s"], cells)
    why = [f"not measured: PyTorch: {found['absent']}"] if found["absent"] else []
    return "\n\n".join([runner.table(head, rows), apart, *why])


def _times(times: dict[str, Any]) -> list[str]:
    shown = ["not reached" if time is None else f"{time:.1f}" for time in times.values()]
    ours, peer = times.get("ours"), times.get("torch")
    return [*shown, f"{ours / peer:.2f}" if ours and peer else ""]


def picture(found: dict[str, Any], path: Path) -> Path:
    """Validation loss over seconds of training, a line for each run."""
    drawn = {
        f"{NAMES[name]}, round {number + 1}": [(point[1], point[2]) for point in run["points"]]
        for name, several in found["runs"].items()
        for number, run in enumerate(several)
    }
    panel = plots.Lines("nanoGPT's recipe", "seconds of training", "validation loss", drawn, level=LEVEL)
    return plots.lines(path, [panel])
