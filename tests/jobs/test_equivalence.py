"""The law: parallel equals serial. The number of ranks, and who takes the step, never change the training."""

import json

import numpy as np
import pytest
from extended import EVERYTHING

from tf_dist.checkpoint import store

STEPS, HALF = 16, 8
# Uneven shares. Two and four: test_golden.py, and all with TF_DIST_TESTS=all; eight: `make bench-exact`.
RANKS = (1, 2, 3, 4) if EVERYTHING else (1, 3)
MODELS = {
    "transformer": ("--model", "transformer"),
    "bfloat16": ("--model", "transformer", "--precision", "bfloat16"),
}
if EVERYTHING:  # test_golden.py has the weights of LSTMs
    MODELS["lstm"] = ("--model", "lstm")
UPDATES = ("allreduce", "master")


ASKED = [(model, update) for model in MODELS for update in UPDATES]


def asked_of(ranks):
    """What some ranks train; who takes the step is no question of one rank, nor one of a precision."""
    if EVERYTHING:
        return ASKED
    return [(m, u) for m, u in ASKED if u == "allreduce" or (ranks > 1 and m == "transformer")]


@pytest.fixture(scope="module")
def runs(launcher, small, tmp_path_factory):
    """The folder of each (ranks, model, update), made when it is first asked for: one job for each number."""
    folder, done = tmp_path_factory.mktemp("equivalence"), set()

    def find(ranks, model, update):
        if ranks not in done:
            asked = [
                # One thread each: how a sum is split between threads is in its last bits.
                [
                    *(*small, "--steps", STEPS, *MODELS[m], "--update", u, "--save-every", HALF),
                    *("--threads-per-rank", "1", "--run-dir", folder / f"{ranks}-{m}-{u}"),
                ]
                for m, u in asked_of(ranks)
            ]
            job = launcher.several(ranks, "train.py", asked, cwd=folder).wait()
            assert job.code == 0, job.output
            done.add(ranks)
        return folder / f"{ranks}-{model}-{update}"

    return find


def weights(path):
    tensors, _, step = store.load(path / "checkpoints" / f"step-{STEPS:08d}")
    assert step == STEPS
    return [tensor for name, tensor in tensors.items() if name.startswith("weights/")]


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def sha256(path):
    return json.loads((path / "status.json").read_text())["weights_sha256"]


@pytest.mark.parametrize(("ranks", "model", "update"), [(n, *one) for n in RANKS for one in asked_of(n)])
def test_any_number_of_ranks_is_one_rank(runs, ranks, update, model):
    """In bits: the weights after 16 steps with dropout, and every loss and norm on the way."""
    serial, parallel = runs(1, model, "allreduce"), runs(ranks, model, update)
    assert sha256(parallel) == sha256(serial)
    for ours, theirs in zip(weights(parallel), weights(serial), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = rows(parallel), rows(serial)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "tokens", "learning_rate"):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name
    assert ours[-1]["loss"] < ours[0]["loss"]


@pytest.mark.parametrize(
    ("first", "then"), [pytest.param(3, 4, marks=pytest.mark.extended), (3, 1)]
)  # bench-faults has all pairs
def test_a_run_goes_on_with_other_ranks(launcher, runs, small, tmp_path, first, then):
    """Saved half way on some ranks, finished on others, with the other update: the bits of one rank."""
    asked = [
        [
            *(*small, "--steps", STEPS, *MODELS[m], "--update", "master", "--threads-per-rank", "1"),
            *("--resume", runs(first, m, "allreduce") / "checkpoints" / f"step-{HALF:08d}"),
            *("--run-dir", tmp_path / m),
        ]
        for m in MODELS
    ]
    job = launcher.several(then, "train.py", asked, cwd=tmp_path).wait()
    assert job.code == 0, job.output
    assert job.output.count(f"resumed at step {HALF} from ") == len(MODELS)
    for m in MODELS:
        assert sha256(tmp_path / m) == sha256(runs(1, m, "allreduce"))


def test_a_resume_says_what_bits_depend_on(run_job, runs, small, tmp_path):
    """Another number of threads may change last bits: it is said, and training goes on."""
    saved = runs(3, "transformer", "allreduce") / "checkpoints" / f"step-{HALF:08d}"
    flags = [
        *small,
        "--steps",
        STEPS,
        "--threads-per-rank",
        "2",
        "--resume",
        saved,
        "--run-dir",
        tmp_path / "run",
    ]
    job = run_job(2, "train.py", *flags, "--resume", saved, "--run-dir", tmp_path / "run")
    assert job.code == 0, job.output
    assert job.output.count("last bits may differ") == 1
    assert "threads per rank: 1 -> 2" in job.output


def test_another_precision_trains_resumes_writes_and_is_measured(run_job, runs, small, tmp_path):
    """It is kept in config.yaml, so that other scripts compute alike; a resume in another is said."""
    before, path = runs(3, "bfloat16", "allreduce"), tmp_path / "run"
    assert "precision: bfloat16" in (before / "config.yaml").read_text()
    assert sha256(before) != sha256(runs(3, "transformer", "allreduce"))
    evaluated = run_job(2, "evaluate.py", "--run-dir", before)
    assert evaluated.code == 0, evaluated.output
    loss = json.loads(evaluated.output.splitlines()[-1])["val_loss"]
    assert np.isfinite(loss)
    written = run_job(1, "generate.py", "--run-dir", before, "--prompt", "a", "--tokens", 5)
    assert written.code == 0, written.output
    saved = before / "checkpoints" / f"step-{STEPS:08d}"
    job = run_job(1, "train.py", *small, "--steps", STEPS + 1, "--resume", saved, "--run-dir", path)
    assert job.code == 0, job.output
    assert "precision: bfloat16 -> float32" in job.output
