"""`make tasks` without its jobs: words, goals, splits, the table, what fails."""

import csv
import json

import numpy as np
import pytest

from tf_dist.bench import runner, tasks
from tf_dist.bench.task_pictures import draw
from tf_dist.bench.task_recipes import RECIPES, SCRATCH, WORDS_READ, Goal
from tf_dist.cli import bench
from tf_dist.config import Config
from tf_dist.data.images import read_png
from tf_dist.data.pictures import caption_picture
from tf_dist.data.wav import write_wav
from tf_dist.errors import BackendMissing, UsageError
from tf_dist.metrics import METRICS
from tf_dist.tasks.registry import TASKS, task_of

KEYS = {metric.key for metric in METRICS.values()} | {WORDS_READ}


def report(**changed):
    facts = {
        "data": "vader-sentiment",
        "examples": 19459,
        "held_out": 1945,
        "minutes": 3.21,
        "ours": {"val_accuracy": 0.81, "val_macro_f1": 0.8},
        "baselines": {"TF-IDF, logistic": {"val_accuracy": 0.789, "val_macro_f1": 0.788}},
        "sha256": {1: "ab" * 32, 2: "ab" * 32},
        "flags": "",
        "shown": [],
    }
    return facts | changed


def test_words_are_recipes_and_paths_of_data():
    assert tasks.parsed(["caption", "noto-emoji=/a=b.jsonl"]) == (["caption"], {"noto-emoji": "/a=b.jsonl"})
    assert tasks.parsed([]) == (list(RECIPES), {})


@pytest.mark.parametrize("word", ["captoin", "noto-emojis=/a.jsonl"])
def test_words_that_name_nothing_are_refused(word):
    with pytest.raises(UsageError, match=r"tasks: no '.*'; there are .*Did you mean"):
        tasks.parsed([word])
    assert bench.main(["tasks", word]) == UsageError.exit_code


def test_nine_tasks_have_a_recipe():
    trained = {recipe.task for recipe in RECIPES.values()}
    first = {"masked-lm"} if any(recipe.before for recipe in RECIPES.values()) else set()
    assert trained | first | {"causal-lm"} == set(TASKS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_flags_that_hold_together_and_goals_that_are_measured(name):
    recipe = RECIPES[name]
    task = task_of(tasks.config_of(recipe, "data.jsonl"))
    assert task.columns() == recipe.columns
    measured = {metric.key for metric in METRICS.values() if metric.name in task.metrics} | {WORDS_READ}
    compared = {*recipe.baselines, "", *([SCRATCH] if recipe.before else [])}
    for goal in recipe.goals:
        assert goal.key in measured
        assert goal.baseline in compared
        assert goal.bound is not None or goal.baseline


@pytest.mark.parametrize(
    ("goal", "baseline", "wanted", "figures"),
    [
        (Goal("val_f1", "b"), 0.5, 0.5, {0.5: False, 0.51: True}),
        (Goal("val_f1", "b", bound=0.8), 0.9, 0.8, {0.8: True, 0.79: False}),
        (Goal("val_chrf", "b", times=2.0), 30.0, 60.0, {60.0: True, 59.9: False}),
        (Goal("val_f1", "b", plus=0.25), 0.5, 0.75, {0.75: True, 0.7: False}),
    ],
)
def test_what_a_goal_wants(goal, baseline, wanted, figures):
    assert goal.wanted(baseline) == wanted
    assert {ours: goal.met(ours, wanted, True) for ours in figures} == figures


def test_of_error_rates_less_is_wanted():
    assert Goal("val_wer", bound=0.3).met(0.25, 0.3, higher_is_better=False)
    assert not Goal("val_wer", bound=0.3).met(0.35, 0.3, higher_is_better=False)


def test_a_goal_without_its_baseline_wants_nothing():
    assert Goal("val_f1", "b", plus=0.1).wanted(None) is None


def test_the_table_has_a_line_for_each_goal():
    shown = tasks.table({"sentiment": report()})
    assert "0.789  TF-IDF, logistic  0.810  >= 0.800  met      3.2   same: abababababab" in shown
    lines = tasks.lines("sections", report(baselines={}))
    assert [line[3] for line in lines] == ["accuracy", "macro_f1"]
    assert [line[7:9] for line in lines] == [["> -", ""], ["> -", ""]]


def test_a_missed_goal_is_said():
    missed = report(ours={"val_accuracy": 0.79})
    assert tasks.lines("sentiment", missed)[0][6:9] == ["0.790", ">= 0.800", "missed"]


def test_other_bits_are_said_and_are_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    other = report(sha256={1: "ab" * 32, 2: "cd" * 32})
    monkeypatch.setattr(tasks, "measured", lambda *_: other)
    assert tasks.main(["sentiment"]) == 1
    assert "DIFFER: abababababab cdcdcdcdcdcd" in capsys.readouterr().out
    monkeypatch.setattr(tasks, "measured", lambda *_: report())
    assert tasks.main(["sentiment"]) == 0
    (saved, _) = sorted((tmp_path / "tasks").glob("*.json")) * 2
    assert json.loads(saved.read_text())["machine"]["cores"]


def test_data_that_cannot_be_had_are_a_line_and_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    monkeypatch.setattr(tasks, "FOLDER", tmp_path / "tasks")
    assert tasks.main(["sentiment", f"vader-sentiment={tmp_path}/none.jsonl"]) == 1
    assert "sentiment  vader-sentiment  failed: no such file or folder" in capsys.readouterr().out


def table_at(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


def test_baselines_are_judged_on_the_rows_that_a_training_holds_out(tmp_path):
    rows = [(f"{'good' if n % 3 else 'bad'} film number {n}", "+" if n % 3 else "-") for n in range(60)]
    source = table_at(tmp_path / "rows.csv", rows)
    recipe = RECIPES["sentiment"]
    sides = tasks.sides_of(recipe, source)
    assert len(sides.val) == 6
    assert not {one.values["text"] for one in sides.train} & {one.values["text"] for one in sides.val}
    place = tasks.Place("sentiment", source, tmp_path)
    try:
        found = tasks.baselines(recipe, place, sides)
    except BackendMissing:
        pytest.skip("scikit-learn is not installed")
    assert found["TF-IDF, logistic"]["val_accuracy"] == 1


def test_speech_is_judged_only_by_a_recogniser_that_was_trained(tmp_path):
    place = tasks.Place("speak", "data.jsonl", tmp_path)
    with pytest.raises(tasks.DataError, match=r"speak needs .*: name `transcribe` before it"):
        tasks.words_read(place, tmp_path / "transcribe" / "run")


def test_spoken_texts_are_read_back_by_the_recogniser(tmp_path, monkeypatch):
    recogniser = tmp_path / "transcribe" / "run"
    recogniser.mkdir(parents=True)
    (recogniser / "config.yaml").write_text("task: transcribe\n")
    row = {"prediction": "predictions.wav/00000.wav", "reference": "one moment please"}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    asked = []

    def evaluated(place, run, *words):
        asked.append((run, *words))
        return {"val_wer": 0.25}

    monkeypatch.setattr(tasks, "evaluated", evaluated)
    assert tasks.words_read(tasks.Place("speak", "data.jsonl", tmp_path), recogniser) == 0.75
    assert asked == [(recogniser, "--data", str(tmp_path / "spoken.jsonl"))]
    cells = json.loads((tmp_path / "spoken.jsonl").read_text())
    assert cells == {"audio": "predictions.wav/00000.wav", "text": "one moment please"}


def test_pictures_of_what_was_made(tmp_path):
    """A spectrogram of each recording, an image with its caption; of other tasks there is nothing to draw."""
    write_wav(tmp_path / "a.wav", np.sin(np.arange(4000) / 5, dtype=np.float32), 8000)
    caption_picture(np.full((4, 4, 3), 200, np.uint8), "", tmp_path / "a.png")
    rows = {
        "speak": {"source": "hello", "target": "a.wav", "reference": "hello", "prediction": "a.wav"},
        "caption": {"source": "a.png", "target": "grey", "reference": "grey", "prediction": "$gray"},
        "classify": {"text": "a", "label": "b", "reference": "b", "prediction": "b"},
    }
    made = {}
    for task, row in rows.items():
        predictions = tmp_path / f"{task}.jsonl"
        predictions.write_text(json.dumps(row) + "\n")
        config = Config(task=task, sample_rate=8000, mels=20)
        made[task] = draw(config, tmp_path / "table.jsonl", predictions)
    assert [len(pictures) for pictures in made.values()] == [2, 1, 0]
    for picture in [*made["speak"], *made["caption"]]:
        assert len(np.unique(read_png(picture, 64, 64))) > 2, "an empty picture"
