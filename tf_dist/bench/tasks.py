"""Every task, trained at np 2 on real data and compared with a baseline on the same split.

    tf-dist bench tasks                         # all of them
    tf-dist bench tasks sections translate      # some
    tf-dist bench tasks caption noto-emoji=/some/folder/train.jsonl

`tf_dist.bench.task_recipes` has data and flags of each. Data come by their names in data/datasets.yaml, or
from the path that ``NAME=PATH`` gives. Metrics are those of `evaluate` over all held-out rows. Minutes are of
training, with the preparation of data that are not prepared yet, and evaluation. Twenty steps on one rank
and on two show whether the weights are the same bits.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tf_dist.bench import runner
from tf_dist.bench.task_pictures import draw
from tf_dist.bench.task_recipes import RECIPES, SCRATCH, WORDS_READ, Goal, TaskRecipe
from tf_dist.config import Config
from tf_dist.data.records import Records
from tf_dist.data.registry import REGISTRY, resolve_sources
from tf_dist.errors import DataError, TfDistError, UsageError
from tf_dist.flags import from_command_line
from tf_dist.metrics import compute, named_metrics
from tf_dist.metrics.registry import METRICS
from tf_dist.ops.supervisor import own_mpirun
from tf_dist.spelling import did_you_mean
from tf_dist.tasks.prepare import Split, split_records
from tf_dist.tasks.registry import task_of

FOLDER = runner.FOLDER / "tasks"
DOWNLOADS = Path("data/downloads")
RANKS = 2
# Steps after which the weights of one rank and of two are compared.
STEPS = 20
DIGITS = 12
HEAD = (
    "task",
    "data",
    "examples",
    "metric",
    "baseline",
    "",
    "ours",
    "wanted",
    "",
    "minutes",
    "SHA-256, np 1 and 2",
)
# Predictions that a report shows.
SHOWN = 5
OF_NAME = {metric.key: metric for metric in METRICS.values()}

Figures = dict[str, float]


@dataclass(frozen=True)
class Place:
    """Where a recipe is trained. name: of the recipe. source: of its data. folder: of its runs and logs."""

    name: str
    source: str
    folder: Path


def main(words: Sequence[str] = ()) -> int:
    """Train what is named, or everything; 1 where data are missing, a job failed, or bits differ."""
    names, paths = parsed(words)
    reports: dict[str, Any] = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            reports[name] = measured(name, RECIPES[name], paths)
        except (TfDistError, SystemExit) as error:
            reports[name] = {"failed": str(error)}
    print(table(reports))
    path = runner.save("tasks", {"tasks": reports})
    print(f"\n{path}")
    failed = any("failed" in report or differs(report) for report in reports.values())
    return int(failed)


def parsed(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The recipes to train, and paths of data by their name.

    Raises:
        UsageError: there is no such recipe or data.
    """
    paths = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word] or list(RECIPES)
    known = {recipe.data for recipe in RECIPES.values()}
    for word, among in [
        *((name, list(RECIPES)) for name in names),
        *((name, sorted(known)) for name in paths),
    ]:
        if word not in among:
            raise UsageError(f"tasks: no {word!r}; there are {', '.join(among)}{did_you_mean(word, among)}")
    return names, paths


def measured(name: str, recipe: TaskRecipe, paths: Mapping[str, str]) -> dict[str, Any]:
    """Train, evaluate, compare.

    Raises:
        DataError: the data cannot be had.
        SystemExit: a job failed.
    """
    (source,) = resolve_sources([paths.get(recipe.data, recipe.data)], REGISTRY, DOWNLOADS)
    place = Place(name, source, FOLDER / name)
    place.folder.mkdir(parents=True, exist_ok=True)
    sides = sides_of(recipe, source)
    figures, minutes = trained(recipe, place)
    draw(config_of(recipe, source), Path(source), place.folder / "predictions.jsonl")
    if any(goal.key == WORDS_READ for goal in recipe.goals):
        figures[WORDS_READ] = words_read(place, FOLDER / "transcribe" / "run")
    return {
        "data": recipe.data,
        "examples": len(sides.train) + len(sides.val),
        "held_out": len(sides.val),
        "minutes": minutes,
        "ours": figures,
        "baselines": baselines(recipe, place, sides),
        "sha256": {ranks: bits(recipe, place, ranks) for ranks in (1, RANKS)},
        "flags": f"{recipe.flags} {recipe.length}",
        "shown": samples(place.folder / "predictions.jsonl"),
    }


# Jobs ---------------------------------------------------------------------------------------------


def options(recipe: TaskRecipe, source: str) -> list[str]:
    """The flags of a training, but for its length and its folder."""
    columns = [word for role, column in recipe.columns.items() for word in (f"--{role}-column", column)]
    return ["--task", recipe.task, "--data", source, *columns, *recipe.flags.split()]


def job(command: str, *words: str, log: Path, ranks: int = RANKS) -> None:
    """Run one of our commands on some ranks. Raises SystemExit where it fails."""
    started = [own_mpirun(), "-np", str(ranks), sys.executable, "-m", "tf_dist", command, *words]
    runner.run([*started, "--progress", "plain" if command == "train" else "none"], log)


def train(place: Place, run: str, words: Sequence[str], ranks: int = RANKS) -> Path:
    """Train in a new folder. Validation is left to `evaluate`; there is one checkpoint, at the end."""
    folder = place.folder / run
    shutil.rmtree(folder, ignore_errors=True)
    kept = ("--eval-every", "0", "--save-every", "0", "--run-dir", str(folder))
    job("train", *words, *kept, log=place.folder / f"{run}.log", ranks=ranks)
    return folder


def evaluated(place: Place, run: Path, *words: str) -> Figures:
    """The figures of a run over all held-out rows."""
    log = place.folder / f"{run.name}-evaluate.log"
    job("evaluate", "--run-dir", str(run), *words, log=log)
    (said,) = (line for line in log.read_text(errors="replace").splitlines() if line.startswith("{"))
    return {key: float(value) for key, value in json.loads(said).items() if value is not None}


def trained(recipe: TaskRecipe, place: Place) -> tuple[Figures, float]:
    """Our figures, and the minutes that they took."""
    begun = time.perf_counter()
    words = [*options(recipe, place.source), *recipe.length.split()]
    if recipe.before:
        words += ["--init-from", str(first_trained(recipe, place))]
    run = train(place, "run", words)
    found = evaluated(place, run, "--predictions", str(place.folder / "predictions.jsonl"))
    return found, (time.perf_counter() - begun) / 60


def first_trained(recipe: TaskRecipe, place: Place) -> Path:
    """The run of masked-lm whose weights are gone on with."""
    text = ("--task", "masked-lm", "--data", place.source, "--text-column", recipe.columns["text"])
    return train(place, "before", [*text, *recipe.before.split()])


def bits(recipe: TaskRecipe, place: Place, ranks: int) -> str:
    """The SHA-256 of the weights after some steps on some ranks."""
    words = [*options(recipe, place.source), "--steps", str(STEPS)]
    if recipe.before:
        words += ["--init-from", str(place.folder / "before")]
    run = train(place, f"np{ranks}", words, ranks)
    return str(json.loads((run / "status.json").read_text())["weights_sha256"])


# What it is compared with -------------------------------------------------------------------------


def config_of(recipe: TaskRecipe, source: str) -> Config:
    """The options of a recipe, as far as they divide its rows."""
    return from_command_line(options(recipe, source), "")[0]


def sides_of(recipe: TaskRecipe, source: str) -> Split:
    """The records that a training learns from, and those that it holds out."""
    config = config_of(recipe, source)
    task = task_of(config)
    records = list(Records(config.data, task.columns(), errors=config.errors).read())
    return split_records(task, config, records)


def baselines(recipe: TaskRecipe, place: Place, sides: Split) -> dict[str, Figures]:
    """The figures of each baseline, by its name."""
    task = task_of(config_of(recipe, place.source))
    references = [task.reference_of(record.values) for record in sides.val]
    found = {
        name: compute(named_metrics(task.metrics), predict(sides.train, sides.val), references)
        for name, predict in recipe.baselines.items()
    }
    if recipe.before:
        words = [*options(recipe, place.source), *recipe.length.split()]
        tokenizer = place.folder / "before" / "tokenizer.json"
        found[SCRATCH] = evaluated(place, train(place, "scratch", [*words, "--tokenizer", str(tokenizer)]))
    return found


def words_read(place: Place, recogniser: Path) -> float:
    """The share of the words of spoken texts that the recogniser of `transcribe` reads: 1 - WER.

    Raises:
        DataError: it has not been trained.
    """
    if not (recogniser / "config.yaml").is_file():
        raise DataError(f"{place.name} needs {recogniser}: name `transcribe` before it")
    columns = RECIPES["transcribe"].columns
    rows = [json.loads(line) for line in (place.folder / "predictions.jsonl").read_text().splitlines()]
    heard = place.folder / "spoken.jsonl"
    cells = [{columns["source"]: row["prediction"], columns["target"]: row["reference"]} for row in rows]
    heard.write_text("".join(json.dumps(row) + "\n" for row in cells))
    return 1.0 - evaluated(place, recogniser, "--data", str(heard))["val_wer"]


def samples(path: Path) -> list[dict[str, str]]:
    """Some of the predictions."""
    with open(path) as file:
        return [json.loads(line) for line, _ in zip(file, range(SHOWN), strict=False)]


# The table ----------------------------------------------------------------------------------------


def table(reports: Mapping[str, Any]) -> str:
    """A line for each goal of each recipe."""
    return runner.table(HEAD, [line for name, report in reports.items() for line in lines(name, report)])


def lines(name: str, report: Mapping[str, Any]) -> list[list[str]]:
    """The lines of a recipe; what failed is one line that says why."""
    recipe = RECIPES[name]
    if "failed" in report:
        return [[name, recipe.data, f"failed: {report['failed']}", *[""] * (len(HEAD) - 3)]]
    facts = [f"{report['minutes']:.1f}", _bits_shown(report)]
    made = []
    for number, goal in enumerate(recipe.goals):
        first = [name, recipe.data, f"{report['examples']:,}"] if number == 0 else [""] * 3
        made.append([*first, *_of_goal(goal, report), *(facts if number == 0 else ["", ""])])
    return made


def _of_goal(goal: Goal, report: Mapping[str, Any]) -> list[str]:
    base = report["baselines"].get(goal.baseline, {}).get(goal.key)
    ours, wanted = report["ours"].get(goal.key), goal.wanted(base)
    higher = goal.key not in OF_NAME or OF_NAME[goal.key].higher_is_better
    verdict = ""
    if ours is not None and wanted is not None:
        verdict = "met" if goal.met(ours, wanted, higher) else "missed"
    sign = (">" if higher else "<") + "=" * (not goal.strictly)
    return [
        goal.key.removeprefix("val_"), _figure(goal, base), goal.baseline, _figure(goal, ours),
        f"{sign} {_figure(goal, wanted)}", verdict,
    ]  # fmt: skip


def _figure(goal: Goal, value: float | None) -> str:
    digits = 1 if goal.key in OF_NAME and OF_NAME[goal.key].best == 100 else 3
    return "-" if value is None else f"{value:.{digits}f}"


def differs(report: Mapping[str, Any]) -> bool:
    """Whether one rank and two have other weights."""
    return len(set(report.get("sha256", {}).values())) > 1


def _bits_shown(report: Mapping[str, Any]) -> str:
    own = [str(digest)[:DIGITS] for digest in report["sha256"].values()]
    return f"DIFFER: {' '.join(own)}" if differs(report) else f"same: {own[0]}"
