"""Tasks as a user runs them: a table and ``--task``; a table that grows; files and mistakes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tf_dist.checkpoint import store

WORDS = "red green blue small large round old new".split()
MODEL = [
    *("--tokenizer", "byte", "--layers", "1", "--width", "16", "--heads", "2", "--dropout", "0.1"),
    *("--seq-len", "16", "--global-batch-size", "8", "--warmup-steps", "2", "--log-every", "1"),
    *("--eval-every", "6", "--save-every", "6", "--threads-per-rank", "1"),
    *("--schedule", "constant", "--val-fraction", "0.1"),
]
ROOT = Path(__file__).parents[2]
ULFM = ("--with-ft", "ulfm")
HALF, STEPS = 6, 12


def write_csv(path, count=60, first=0, labels=("no", "yes"), mode="w"):
    rng = np.random.default_rng(first)
    with open(path, mode, encoding="utf-8", newline="") as file:
        file.write("" if first else "text,label\n")
        for row in range(first, first + count):
            label = labels[row % len(labels)]
            file.write(f'"{label} {" ".join(rng.choice(WORDS, 2))}, {row}",{label}\n')


def write_pairs(path, count=60):
    rng = np.random.default_rng(1)
    rows = ([*rng.choice(WORDS, 2), str(row)] for row in range(count))
    lines = [json.dumps({"source": " ".join(row), "target": row[0].upper()}) + "\n" for row in rows]
    path.write_text("".join(lines))


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def sha256(run):
    return json.loads((run / "status.json").read_text())["weights_sha256"]


@pytest.fixture(scope="module")
def runs(launcher, tmp_path_factory):
    """Runs of one rank, with their tables: classify, translate by an LSTM, and masked-lm then classify."""
    folder = tmp_path_factory.mktemp("tasks")
    write_csv(folder / "table.csv")
    write_pairs(folder / "pairs.jsonl")
    (folder / "text.txt").write_text(" ".join(np.random.default_rng(2).choice(WORDS, 500)))
    asked = [
        [*MODEL, "--task", "classify", "--data", "table.csv", "--steps", STEPS, "--run-dir", "classify"],
        [
            *(*MODEL, "--task", "translate", "--data", "pairs.jsonl", "--steps", HALF, "--target-len", "8"),
            *("--model", "lstm", "--run-dir", "translate"),
        ],
        [*MODEL, "--task", "masked-lm", "--data", "text.txt", "--steps", HALF, "--run-dir", "masked"],
        [*MODEL, "--data", "text.txt", "--steps", HALF, "--run-dir", "causal"],
        *(
            [
                *(*MODEL, "--task", "classify", "--data", "table.csv", "--steps", "1"),
                *("--init-from", body, "--run-dir", f"{body}-classify"),
            ]
            for body in ("masked", "causal")
        ),
    ]
    job = launcher.several(1, "train.py", asked, cwd=folder).wait()
    assert job.code == 0, job.output
    return folder, job


def test_what_a_run_tells(runs):
    folder, job = runs
    rows = [row for row in metrics(folder / "classify") if row.get("val_loss") is not None]
    assert [row["step"] for row in rows] == [HALF, STEPS]
    assert {"val_accuracy", "val_macro_f1"} <= rows[-1].keys()
    assert {"val_bleu", "val_chrf"} <= metrics(folder / "translate")[-1].keys()
    assert "54 rows to train on, 6 held out, 2 labels" in job.output
    assert "classify, encoder, 2 labels" in job.output and "translate, encoder-decoder" in job.output
    assert "predictions  (reference, then prediction)" in job.output
    assert "Traceback" not in job.output


def test_a_new_head_on_an_old_body(runs):
    """The classifier is new; what both models have begins as it was."""
    said = [line for line in runs[1].output.splitlines() if "initial weights" in line]
    assert len(said) == 2 and all("new: classifier/" in line for line in said), said


def test_two_ranks_and_a_resume_with_a_table_that_has_grown(launcher, runs, tmp_path):
    """The run goes on with its own rows, to the bits of one rank that was never stopped."""
    folder, _ = runs
    write_csv(tmp_path / "table.csv")
    flags = [*MODEL, "--task", "classify", "--data", "table.csv", "--run-dir", "run"]
    job = launcher.start(2, "train.py", *flags, "--steps", HALF, cwd=tmp_path).wait()
    assert job.code == 0, job.output
    write_csv(tmp_path / "table.csv", 12, first=60, labels=("maybe",), mode="a")
    job = launcher.start(2, "train.py", *flags, "--steps", STEPS, cwd=tmp_path).wait()
    assert job.code == 0, job.output
    assert "it continues with its own tokens" in job.output
    assert sha256(tmp_path / "run") == sha256(folder / "classify")
    ours, theirs = metrics(tmp_path / "run"), metrics(folder / "classify")
    for name in ("loss", "val_loss", "val_accuracy", "val_macro_f1"):
        assert [row.get(name) for row in ours] == [row.get(name) for row in theirs], name


@pytest.mark.parametrize("fault", ["rank=1,step=4", "rank=0,step=6,phase=validation"])
def test_a_rank_that_is_killed_changes_nothing(launcher, runs, tmp_path, fault):
    """Neither in a step nor where rows are predicted: the others have the bits of one rank."""
    folder, _ = runs
    write_csv(tmp_path / "table.csv")
    flags = [*MODEL, "--task", "classify", "--data", "table.csv", "--steps", STEPS, "--run-dir", "run"]
    env = {"TF_DIST_FAULT": f"kill:{fault}"}
    job = launcher.start(2, ULFM, "train.py", *flags, cwd=tmp_path, env=env).wait()
    assert job.code == 0, job.output
    assert sha256(tmp_path / "run") == sha256(folder / "classify")
    ours, theirs = metrics(tmp_path / "run"), metrics(folder / "classify")
    for name in ("val_loss", "val_accuracy", "val_macro_f1"):
        assert [row.get(name) for row in ours] == [row.get(name) for row in theirs], name


GENERATE = """
import json, sys
from tf_dist.cli import evaluate, generate, prepare

COMMANDS = {"evaluate": evaluate.main, "generate": generate.main, "prepare": prepare.main}
for words in json.loads(sys.argv[1]):
    print("-- asked", words[0], flush=True)
    code = COMMANDS[words[0]](words[1:])
    print("code", code, flush=True)
"""


def test_what_a_task_predicts_for_prompts(run_job, runs, tmp_path):
    """The same as for held-out rows, of one prompt, of several, and of a table without targets."""
    folder, _ = runs
    (tmp_path / "generate.py").write_text(GENERATE)
    (tmp_path / "table.csv").write_bytes((folder / "table.csv").read_bytes())
    (tmp_path / "pairs.jsonl").write_bytes((folder / "pairs.jsonl").read_bytes())
    (tmp_path / "rows.jsonl").write_text('{"words": "red small 3"}\n{"words": "blue old 4"}\n')
    (tmp_path / "other.csv").write_text((folder / "table.csv").read_text().replace("text,label", "body,mood"))
    columns = {"classify": ["--text-column", "body", "--label-column", "mood"], "translate": []}
    tables = [
        [
            "evaluate",
            "--run-dir",
            folder / run,
            "--data",
            data,
            "--predictions",
            f"{run}.jsonl",
            *columns[run],
        ]
        for run, data in (("classify", "other.csv"), ("translate", "pairs.jsonl"))
    ]
    job = run_job(0, tmp_path / "generate.py", json.dumps(tables, default=str))
    assert job.code == 0 and job.output.count("code 0") == 2, job.output
    wanted = {
        run: [json.loads(line) for line in (tmp_path / f"{run}.jsonl").read_text().splitlines()][:3]
        for run in ("classify", "translate")
    }
    texts = [row["text"] for row in wanted["classify"]]
    (tmp_path / "sources.txt").write_text("".join(row["source"] + "\n" for row in wanted["translate"]))
    classify, translate = (["generate", "--run-dir", folder / run] for run in ("classify", "translate"))
    asked = [
        [*classify, "--prompt", texts[0]],
        [*classify, *(word for text in texts for word in ("--prompt", text)), "--batch", "2"],
        [*translate, "--prompts", "sources.txt", "--batch", "2"],
        [*translate, "--prompts", "rows.jsonl", "--source-column", "words", "--beams", "2"],
        ["generate", "--run-dir", folder / "masked", "--prompt", "red"],
        [*classify, "--prompt", "red", "--beams", "2"],
        [*translate, "--prompt", "red", "--tokens", "2"],
        [*translate],
        [*translate, "--prompts", "rows.jsonl"],
        ["prepare", "--task", "classify", "--data", "table.csv", "--tokenizer", "byte", "--seq-len", "16"],
    ]
    job = run_job(0, tmp_path / "generate.py", json.dumps(asked, default=str))
    assert job.code == 0 and "Traceback" not in job.output, job.output
    parts = job.output.split("-- asked ")[1:]
    codes = [int(part.rsplit("code ", 1)[1]) for part in parts]
    assert codes == [0, 0, 0, 0, 64, 64, 64, 64, 65, 0], job.output
    assert wanted["classify"][0]["prediction"] in parts[0].splitlines()
    for part, run, role in ((parts[1], "classify", "text"), (parts[2], "translate", "source")):
        made = [json.loads(line) for line in part.splitlines() if line.startswith("{")]
        assert made == [{role: row[role], "prediction": row["prediction"]} for row in wanted[run]]
    rows = [json.loads(line) for line in parts[3].splitlines() if line.startswith("{")]
    assert [row["source"] for row in rows] == ["red small 3", "blue old 4"]
    for part, words in zip(
        parts[4:9],
        ["continues no text", "nothing token by token", "--tokens", "give --prompt", "'source'"],
        strict=True,
    ):
        assert words in part, job.output
    assert "rows, " in parts[9] and "labels 2" in parts[9]


CONVERT = """
import sys
from tf_dist.cli import checkpoint

for words in sys.argv[1:]:
    if code := checkpoint.main(words.split()):
        sys.exit(code)
"""


def test_files_of_weights(run_job, runs, tmp_path):
    """Exported and imported again: the same weights, of a Transformer and of an LSTM."""
    folder, _ = runs
    (tmp_path / "convert.py").write_text(CONVERT)
    asked, made = [], {}
    for run in ("classify", "translate"):
        for ending in (".safetensors", ".weights.h5", ".keras"):
            new = tmp_path / f"{run}{ending}.run"
            new.mkdir()
            for name in ("config.yaml", "tokenizer.json"):
                (new / name).write_bytes((folder / run / name).read_bytes())
            asked += [f"convert {folder / run} {run}{ending}", f"convert {run}{ending} {new}"]
            made[new] = folder / run
        asked += [f"verify {folder / run}", f"show {folder / run}"]
    job = run_job(0, tmp_path / "convert.py", *asked)
    assert job.code == 0 and "Traceback" not in job.output, job.output
    for new, run in made.items():
        (one,) = store.listing(new / "checkpoints")
        ours, theirs = store.load(one)[0], store.load(store.newest(run / "checkpoints"))[0]
        names = [name for name in theirs if name.startswith("weights/")]
        assert names and all(np.array_equal(ours[name], theirs[name]) for name in names), new


MISTAKES = {
    "no such column": (["--label-column", "mood"], 65, ["table.csv", "'mood'", "--label-column"]),
    "an empty label": (["--data", "empty.csv"], 65, ["row 2 of", "empty.csv", "'label'", "empty"]),
    "an empty target": (
        ["--task", "translate", "--data", "empty.jsonl"], 65, ["row 2 of", "empty.jsonl", "'target'"],
    ),
    "a broken table": (["--data", "broken.csv"], 65, ["broken.csv", "line 2"]),
    "a text as label": (["--data", "long.csv"], 65, ["row 1 of", "long.csv", "--label-column"]),
    "another number of classes": (["--classes", "3"], 64, ["--classes 3", "2 labels"]),
    "another architecture": (["--architecture", "decoder"], 64, ["decoder", "classify", "encoder"]),
    "an unknown task": (["--task", "clasify"], 64, ["'clasify'", "'classify'?"]),
    "context parallelism": (
        ["--sequence-parallel", "2", "--dropout", "0"],
        64,
        ["--sequence-parallel 2", "classify"],
    ),
}  # fmt: skip


@pytest.fixture
def tables(tmp_path):
    write_csv(tmp_path / "table.csv")
    (tmp_path / "empty.csv").write_text("text,label\na,b\nc,\n")
    (tmp_path / "empty.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": "c", "target": ""}\n')
    (tmp_path / "broken.csv").write_text('text,label\n"a,b\nc,d\n')
    (tmp_path / "long.csv").write_text(f"text,label\na,{'long ' * 999}\n")
    return tmp_path


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(tables, run_job, one_error, name):
    """Said once, before a run folder is made."""
    flags, code, words = MISTAKES[name]
    flags = ["--task", "classify", "--data", "table.csv", "--steps", "2", *flags]
    job = run_job(2, "train.py", *MODEL, *flags, timeout=120)
    one_error(job, code, *words)
    assert not (tables / "runs").exists()


def test_a_metric_whose_package_is_missing_is_said_first(tables, run_job, one_error):
    write_pairs(tables / "pairs.jsonl")
    (tables / "hiding").mkdir()
    (tables / "hiding" / "sacrebleu.py").write_text("raise ImportError('it is hidden')\n")
    path = os.pathsep.join([str(tables / "hiding"), str(ROOT)])
    job = run_job(
        2, "train.py", *MODEL, "--task", "translate", "--data", "pairs.jsonl", env={"PYTHONPATH": path}
    )
    one_error(job, 69, "sacrebleu", "pip install 'tf_dist[tasks]'")
    assert not (tables / "runs").exists() and not (tables / "data").exists(), "something was prepared"
