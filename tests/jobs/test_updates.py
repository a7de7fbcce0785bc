"""Whole jobs with updates that talk less: each trains, validates, saves, writes text, and goes on."""

import json

import pytest
from extended import EVERYTHING

STEPS, HALF = 8, 4
WAYS = {
    "local-sgd": ("--update", "local-sgd", "--sync-every", "3", "--sync-warmup-steps", "1"),
    "diloco": ("--update", "diloco", "--sync-every", "2", "--outer-precision", "bfloat16"),
    "downpour": ("--update", "downpour", "--staleness", "2", "--master-trains", "on"),
    "easgd": ("--update", "easgd", "--sync-every", "2"),
    "gossip": ("--update", "gossip"),
    "onebit": ("--compression", "onebit", "--compression-start", "2"),
    "no staleness": ("--update", "downpour", "--staleness", "0"),
    "bf16": ("--compression", "bf16"),
    "topk": ("--compression", "topk", "--compression-density", "0.1"),
    "powersgd": ("--compression", "powersgd", "--compression-rank", "2"),
    "allreduce": (),
}
# Trained by tests/jobs/test_golden.py as well, which also compares the last two with each other.
GOLDEN = ["diloco", "onebit", "bf16", "topk", "no staleness", "allreduce"]
if not EVERYTHING:
    WAYS = {name: flags for name, flags in WAYS.items() if name not in GOLDEN}


@pytest.fixture(scope="module")
def runs(launcher, small, tmp_path_factory):
    """The folder of each run on two ranks, all made by one job; and of each gone on with from half of it."""
    folder = tmp_path_factory.mktemp("updates")
    whole, gone_on = [], []
    for name, more in WAYS.items():
        flags = [*small, "--steps", STEPS, "--save-every", HALF, "--eval-every", HALF, *more]
        flags += ["--threads-per-rank", "1"]
        whole.append([*flags, "--run-dir", folder / name])
        saved = folder / name / "checkpoints" / f"step-{HALF:08d}"
        gone_on.append([*flags, "--resume", saved, "--run-dir", folder / f"{name}-again"])
    job = launcher.several(2, "train.py", whole + gone_on, cwd=folder).wait()
    assert job.code == 0, job.output
    return folder, job.output


def status(path):
    return json.loads((path / "status.json").read_text())


def losses(path):
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


@pytest.mark.parametrize("name", WAYS)
def test_it_trains_validates_and_goes_on(runs, name):
    folder, _ = runs
    path, again = folder / name, folder / f"{name}-again"
    assert status(path)["state"] == status(again)["state"] == "done"
    found, later = losses(path), losses(again)
    assert sorted(found) == list(range(1, STEPS + 1)) and sorted(later) == list(range(HALF + 1, STEPS + 1))
    if name != "easgd":  # whose master hears of losses at exchanges only
        assert found[STEPS] < found[1]
    if name not in ("downpour", "gossip"):  # where what comes first is a matter of chance
        assert status(again)["weights_sha256"] == status(path)["weights_sha256"]
        assert all(later[step] == found[step] for step in later)


@pytest.mark.extended
def test_no_staleness_is_allreduce_to_the_bit(runs):
    folder, _ = runs
    shas = {status(folder / name)["weights_sha256"] for name in ("no staleness", "allreduce")}
    assert len(shas) == 1


def test_what_is_said(runs):
    _, output = runs
    assert output.count("weights of all ranks meet every 3 steps") == 2
    assert output.count("a master deals out units of") == 2 * sum(
        "downpour" in flags for flags in WAYS.values()
    )
    assert output.count("stayed behind") == 2 * sum("--compression" in flags for flags in WAYS.values())


def test_what_the_master_did_is_kept(runs):
    folder, _ = runs
    report = json.loads((folder / "downpour" / "asynchronous.json").read_text())
    assert sum(report["staleness"].values()) == report["updates"] > STEPS
    assert 0 < report["master_load"] <= 1 and report["updates_per_s"] > 0
