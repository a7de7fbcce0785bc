"""Steps to a validation loss: Muon against AdamW, on nanoGPT's CPU recipe.

    tf-dist bench muon                       # one round, some three minutes
    tf-dist bench muon text.txt rounds=3

AdamW is ``tf-dist train --preset nanogpt-cpu``, 2,000 steps; Muon is the same with ``--optimizer muon``, its
learning rate and 0.6 of the steps, so that its schedule ends there. Between two evaluations the loss is taken
to fall in a straight line.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tf_dist.bench import plots, runner
from tf_dist.bench.nanogpt import LEVEL, RANKS, TEXTS
from tf_dist.ops.supervisor import own_mpirun

FOLDER = runner.FOLDER / "muon"
STEPS, EVERY, SHARE = 2000, 50, 0.6
WAYS = {
    "AdamW": [],
    "Muon": ["--optimizer", "muon", "--optimizer-args", "beta_2=0.99", "--learning-rate", "6e-3",
             "--min-learning-rate", "1e-4"],
}  # fmt: skip

Point = tuple[float, float]  # step, validation loss


def main(words: Sequence[str] = ()) -> int:
    """Train both, print after how many steps each reached the loss, and draw the curves."""
    rounds = next((int(word[7:]) for word in words if word.startswith("rounds=")), 1)
    paths = [Path(word) for word in words if "=" not in word]
    text = next((path for path in [*paths, *TEXTS] if path.is_file()), None)
    if text is None:
        print("bench-muon: skipped, for there is no text: make bench-muon ARGS=text.txt")
        return 0
    found: dict[str, list[list[Point]]] = {name: [] for name in WAYS}
    for seed in range(1, rounds + 1):
        for name in WAYS:
            print(f"{name}, round {seed} of {rounds} ...", flush=True)
            found[name].append(curve(name, text, seed))
    print(f"\n{table(found)}")
    path = runner.save("muon", {"text": text.name, "curves": found})
    print(f"\nin {path}\nand {picture(found, path.with_suffix('.png'))}")
    return 0


def curve(name: str, text: Path, seed: int) -> list[Point]:
    """The validation losses of one training."""
    folder = FOLDER / f"{name.lower()}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    steps = STEPS if name == "AdamW" else round(STEPS * SHARE)
    command = [own_mpirun(), "-np", str(RANKS), sys.executable, "-m", "tf_dist", "train"]
    command += ["--preset", "nanogpt-cpu", "--data", str(text), "--seed", str(seed), "--steps", str(steps)]
    command += ["--eval-every", str(EVERY), "--log-every", str(EVERY), "--save-every", "0", *WAYS[name]]
    runner.run([*command, "--progress", "none", "--run-dir", str(folder)], FOLDER / f"{folder.name}.log")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]


def reached(points: Sequence[Point], level: float) -> float | None:
    """The step at which the loss first was ``level``, on a line between evaluations; None: never."""
    before: Point | None = None
    for step, loss in points:
        if loss <= level:
            if before is None:
                return float(step)
            share = (before[1] - level) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def level_of(found: dict[str, list[list[Point]]]) -> float:
    """The published loss, or the lowest one that all AdamW runs have reached, where that is higher."""
    return max(LEVEL, *(min(loss for _, loss in points) for points in found["AdamW"]))


def table(found: dict[str, list[list[Point]]]) -> str:
    """Steps to the loss, and the lowest loss, of each round; the ratio last."""
    level, rows = level_of(found), []
    for number, both in enumerate(zip(*found.values(), strict=True), 1):
        steps = [reached(points, level) for points in both]
        lowest = [min(loss for _, loss in points) for points in both]
        ratio = f"{steps[1] / steps[0]:.2f}" if all(steps) and steps[0] and steps[1] else "not reached"
        said = ["-" if step is None else f"{step:,.0f}" for step in steps]
        rows.append([str(number), said[0], f"{lowest[0]:.3f}", said[1], f"{lowest[1]:.3f}", ratio])
    head = [
        "round",
        f"AdamW, steps to {level:.3f}",
        "lowest",
        f"Muon, steps to {level:.3f}",
        "lowest",
        "ratio",
    ]
    return runner.table(head, rows)


def picture(found: dict[str, list[list[Point]]], path: Path) -> Path:
    """The curves of the first round."""
    lines: dict[str, Any] = {name: curves[0] for name, curves in found.items()}
    panel = plots.Lines("nanoGPT's CPU recipe", "step", "validation loss", lines, level=level_of(found))
    return plots.lines(path, [panel])
