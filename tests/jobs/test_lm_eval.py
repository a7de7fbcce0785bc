"""lm-evaluation-harness on a run, over ranks, against the harness's own backend on the exported folder."""

import json
import os
import subprocess

import pytest
from launching import ROOT

PYTHON = ROOT / ".venv-torch" / "bin" / "python"
# What all tasks begin with.
DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
"""
CHOICES = """
task: made_choices
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["the cat", "a dog and", "of"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: made_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}} {{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GREEDY = """
task: made_greedy
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
TASKS = "made_choices,made_text,made_greedy"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": f"{word} one", "label": n % 3, "answer": "e"}
        for n, word in enumerate("ab the in on".split())
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choices", CHOICES), ("text", ROLLING), ("greedy", GREEDY)):
        (folder / f"{name}.yaml").write_text(DATA.replace("FILE", str(folder / "data.jsonl")) + text)
    return folder


def numbers(results):
    return {
        (task, name): value
        for task, found in results.items()
        for name, value in found.items()
        if isinstance(value, float) and "stderr" not in name
    }


def test_the_numbers_are_those_of_the_harnesss_own_backend(launcher, small, tasks, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    flags = [*small, "--activation", "gelu-tanh", "--steps", "30", "--dropout", "0", "--run-dir", "run"]
    run = launcher.start(2, "train.py", *flags, cwd=tmp_path).wait()
    assert run.code == 0, run.output
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    found = {}
    for ranks in (0, 2):
        words = [
            "lm-eval",
            "run",
            "--tasks",
            TASKS,
            "--include-path",
            str(tasks),
            "--output",
            f"{ranks}.json",
        ]
        job = launcher.start(ranks, "-m", "tf_dist", *map(str, words), cwd=tmp_path, env=offline).wait()
        assert job.code == 0, job.output
        found[ranks] = numbers(json.loads((tmp_path / f"{ranks}.json").read_text())["results"])
    assert found[0] == found[2] and len(found[0]) >= 5

    done = subprocess.run([PYTHON, "-c", "import lm_eval, transformers"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no lm_eval in .venv-torch: make torch")
    job = launcher.start(0, "-m", "tf_dist", "checkpoint", "export", "run", "folder", cwd=tmp_path).wait()
    assert job.code == 0, job.output
    code = f"""
import json, lm_eval
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model="hf", model_args="pretrained=folder,dtype=float32,device=cpu", batch_size=1,
    tasks={TASKS.split(",")!r},
    task_manager=TaskManager(include_path={str(tasks)!r}, include_defaults=False), bootstrap_iters=0,
)
json.dump(found["results"], open("theirs.json", "w"), default=str)
"""
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **offline}
    done = subprocess.run(
        [PYTHON, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = numbers(json.loads((tmp_path / "theirs.json").read_text()))
    assert theirs.keys() == found[0].keys()
    for name, value in theirs.items():
        assert found[0][name] == pytest.approx(value, rel=1e-5), name
