"""Whole jobs on grids: each trains, validates, writes text, saves and goes on as one rank does."""

import json
import re

import pytest
from extended import EVERYTHING

from tf_dist.checkpoint.manifest import read_manifest

STEPS, HALF = 8, 4
FOUR = {
    "1x2x2": ("--pipeline-parallel", "2", "--tensor-parallel", "2", "--pipeline-schedule", "zero-bubble"),
    "2x2x1": ("--pipeline-parallel", "2"),
    "lstm": ("--model", "lstm", "--pipeline-parallel", "2", "--tensor-parallel", "2"),
    "sequence": ("--sequence-parallel", "2", "--update", "zero", "--dropout", "0"),
}
EIGHT = {"2x2x2": ("--pipeline-parallel", "2", "--tensor-parallel", "2", "--update", "zero")}
ALONE = {"one": (), "lstm": ("--model", "lstm"), "no dropout": ("--dropout", "0")}
if not EVERYTHING:  # tests/mpi/test_grid_mpi.py trains on them
    FOUR = {name: FOUR[name] for name in ("1x2x2", "sequence")}
    del ALONE["lstm"]
LIKE = {"lstm": "lstm", "sequence": "no dropout"}


@pytest.fixture(scope="module")
def runs(launcher, small, tmp_path_factory):
    """The folder of each run, made when it is first asked for: one job for each number of ranks."""
    folder, done = tmp_path_factory.mktemp("grids"), set()

    def find(ranks, name):
        asked = {1: ALONE, 4: FOUR, 8: EIGHT}[ranks]
        if ranks not in done:
            flags = [
                [
                    *(*small, "--layers", "2", "--steps", STEPS, "--save-every", HALF, "--eval-every", HALF),
                    *(*more, "--threads-per-rank", "1", "--run-dir", folder / f"{ranks}-{one}"),
                ]
                for one, more in asked.items()
            ]
            job = launcher.several(ranks, "train.py", flags, cwd=folder).wait()
            assert job.code == 0, job.output
            assert job.output.count("more text") == len(asked)
            done.add(ranks)
        return folder / f"{ranks}-{name}"

    return find


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def status(path):
    return json.loads((path / "status.json").read_text())


def near(found, expected):
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("loss", "val_loss", "grad_norm", "tokens"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5), (key, ours["step"])


def layout(path):
    """Names and shapes of a checkpoint's tensors; Keras numbers the optimizers of a process."""
    manifest = read_manifest(path / "checkpoints" / f"step-{STEPS:08d}")
    return [(re.sub(r"adam_w_\d+", "adam_w", one["name"]), one["shape"]) for one in manifest["tensors"]]


@pytest.mark.parametrize(
    ("ranks", "name"), [*((4, name) for name in FOUR), pytest.param(8, "2x2x2", marks=pytest.mark.extended)]
)
def test_a_grid_trains_and_validates_as_one_rank(runs, ranks, name):
    path, alone = runs(ranks, name), runs(1, LIKE.get(name, "one"))
    near(rows(path), rows(alone))
    assert status(path)["state"] == "done"
    assert status(path)["ranks"] == ranks
    assert layout(path) == layout(alone)


@pytest.mark.parametrize(
    ("first", "then", "more"),
    [
        pytest.param((8, "2x2x2"), 1, (), marks=pytest.mark.extended),
        ((4, "1x2x2"), 2, ()),
    ],
)
def test_a_run_goes_on_with_another_grid(run_job, runs, small, tmp_path, first, then, more):
    saved = runs(*first) / "checkpoints" / f"step-{HALF:08d}"
    flags = [*small, "--layers", "2", "--steps", STEPS, "--eval-every", HALF, "--threads-per-rank", "1"]
    path = tmp_path / "run"
    job = run_job(then, "train.py", *flags, *more, "--resume", saved, "--run-dir", path)
    assert job.code == 0, job.output
    assert f"resumed at step {HALF} from " in job.output
    near(rows(path), [row for row in rows(runs(1, "one")) if row["step"] > HALF])


def test_text_from_a_grids_checkpoint(run_job, runs):
    written = run_job(1, "generate.py", "--run-dir", runs(4, "1x2x2"), "--prompt", "the ", "--tokens", 5)
    assert written.code == 0, written.output
    # A machine that is busy shows progress first, on stderr.
    assert [line for line in written.output.splitlines() if line.startswith("the ")], written.output


def test_degrees_that_do_not_divide_the_ranks_are_refused_before_tensorflow(run_job, small, tmp_path):
    job = run_job(3, "train.py", *small, "--layers", "2", "--pipeline-parallel", "2", cwd=tmp_path)
    assert job.code == 64
    assert job.output.count("pipeline_parallel 2 does not divide 3 ranks: start 2 or 4 ranks") == 1
    assert "Traceback" not in job.output
