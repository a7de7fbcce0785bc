"""The others go on where ranks are killed, and MPI lets them (ULFM)."""

import json
import os
import signal
from dataclasses import replace

import pytest

ULFM = ("--with-ft", "ulfm")
# Ends ranks in the middle of a step; then all numbers that the others find, on one line.
SCRIPT = """
import json, os, signal, sys
from tf_dist.comm.runtime import launch

update, deaths, options = (json.loads(word) for word in sys.argv[1:])
comm = launch.connect()
import keras, numpy as np
from tf_dist.config import Config
from tf_dist.models.build import build
from tf_dist.training.trainer import Trainer

model = build(Config(layers=1, width=16, heads=2, seq_len=8, vocab_size=17))
trainer = Trainer(
    model, keras.optimizers.Adam(1e-2), comm, update,
    global_batch_size=16, micro_batch_size=2, seq_len=8, clip_norm=0.0, **options,
)
gradients, last = trainer.replica.gradients, deaths.get(str(comm.rank), 1000)

def until_death(x, y, draw):
    if draw[0] >= last:
        os.kill(os.getpid(), signal.SIGKILL)
    return gradients(x, y, draw)

trainer.replica.gradients = until_death
tokens = np.arange(5000) ** 2 % 17
logs = trainer.fit(tokens, steps=24, validation=tokens[:500], eval_every=8)
found = [logs["val_loss"], trainer.lost, comm.size, trainer.tokens, trainer.check_equal()]
if comm.rank == 0:
    print("FOUND " + json.dumps(found), flush=True)
"""
TOKENS = 24 * 16 * 8


@pytest.fixture
def train(run_job, tmp_path):
    """``train(ranks, update, deaths, **options)``: a job, with the step at which some of its ranks die."""
    (tmp_path / "train.py").write_text(SCRIPT)

    def start(ranks, update, deaths, fault="", **options):
        words = map(json.dumps, (update, deaths, options))
        return run_job(ranks, ULFM, tmp_path / "train.py", *words, env={"TF_DIST_FAULT": fault})

    return start


@pytest.fixture(scope="module")
def calm(launcher, tmp_path_factory):
    """What a run of one rank finds, in which nobody dies."""
    folder = tmp_path_factory.mktemp("calm")
    (folder / "train.py").write_text(SCRIPT)
    words = map(json.dumps, ("allreduce", {}, {}))
    return found(launcher.start(1, ULFM, folder / "train.py", *words, cwd=folder).wait())


def found(job):
    assert job.code == 0, job.output
    (line,) = [line for line in job.output.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


@pytest.mark.parametrize(
    ("update", "options"),
    [
        ("downpour", {"asynchrony": {"staleness": 2}}),
        ("easgd", {"local": {"sync_every": 2}}),
        ("gossip", {}),
    ],
)
def test_two_die_and_the_others_go_on(train, update, options):
    """One in the first stretch, one in the second; nothing is counted twice."""
    job = train(3, update, {"1": 3, "2": 12}, **options)
    losses, lost, left, tokens, _ = found(job)
    assert lost == [1, 2] and left == 1
    assert "rank 1 died before step 8: 2 ranks go on" in job.output
    assert losses[0] > losses[1] > losses[2]
    if update == "downpour":  # which lets others do what the dead had in hand
        assert tokens == TOKENS
    else:
        assert 0.5 * TOKENS < tokens < TOKENS


def test_nobody_is_left_but_the_master(train, calm):
    """With no staleness the bits are those of a run in which nobody dies."""
    options = {"asynchrony": {"staleness": 0}}
    job = train(3, "downpour", {"1": 1, "2": 3}, **options)
    assert found(job)[1:4] == [[1, 2], 1, TOKENS]
    assert found(job)[0] == calm[0] and found(job)[4] == calm[4]


def test_nobody_can_do_without_the_master(train):
    job = train(3, "downpour", {"0": 5}, asynchrony={"master_trains": "on"})
    assert job.code == 70, job.output
    assert "error: rank 0 has died" in job.output and "Traceback" not in job.output


def test_too_few_are_left(train):
    job = train(3, "allreduce", {"2": 5}, min_ranks=3)
    assert job.code == 70, job.output
    assert job.output.count("error: 2 ranks are left, and --min-ranks is 3") == 1
    assert "rank 0: " not in job.output and "Traceback" not in job.output


def test_whoever_dies_the_weights_are_the_same(train, calm):
    """Two in the middle of one step, and rank 0 later: nothing has to be read from a file, or done again."""
    places = ("rank=1,step=5,phase=gradient", "rank=3,step=5,phase=allreduce", "rank=0,step=13,phase=update")
    job = train(4, "allreduce", {}, fault=";".join(f"kill:{place}" for place in places))
    assert found(job)[2:4] == [1, TOKENS] and sorted(found(job)[1]) == [0, 1, 3]
    assert found(job)[0] == calm[0] and found(job)[4] == calm[4]


def rows_of(run):
    """What the metrics say, but for times and sums that depend on how gradients were divided."""
    return [[row[key] for key in ("step", "loss", "val_loss", "tokens")] for row in run.metrics]


@pytest.fixture
def train_with(launcher, first_run, tmp_path):
    """``train_with(fault, *flags)``: the first run again, on three ranks, with a fault."""

    def start(fault, *flags):
        path = tmp_path / "faulty"
        words = [*first_run.flags, "--threads-per-rank", "1", *flags, "--run-dir", path]
        job = launcher.start(3, ULFM, "train.py", *words, cwd=tmp_path, env={"TF_DIST_FAULT": fault}).wait()
        assert job.code == 0, job.output
        return replace(first_run, path=path, job=job)

    return start


@pytest.fixture
def killed(launcher, first_run, tmp_path):
    """``killed(rank, *flags, ranks=3)``: the first run again, with a rank that is killed from outside."""

    def start(rank, *flags, ranks=3):
        path = tmp_path / "killed"
        words = [*first_run.flags, "--threads-per-rank", "1", *flags, "--run-dir", path]
        job = launcher.start(ranks, ULFM, "train.py", *words, cwd=tmp_path)
        metrics = path / "metrics.jsonl"
        job.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5)
        os.kill(job.pid_of_rank(rank), signal.SIGKILL)
        ended = job.wait()
        assert ended.code == 0, ended.output
        return replace(first_run, path=path, job=ended)

    return start


@pytest.mark.cold
def test_a_run_goes_on_without_its_first_rank(killed, first_run):
    """The next one writes its files, and on the terminal."""
    run = killed(0)
    assert "rank 0 died in step" in run.job.output and "2 ranks go on after" in run.job.output
    assert "done at step 60" in run.job.output and "sample " in run.job.output
    assert run.status["state"] == "done" and run.status["ranks_lost"] == [0] and run.status["ranks"] == 2
    assert [one["lost"] for one in run.status["recoveries"]] == [[0]]
    assert run.status["weights_sha256"] == first_run.status["weights_sha256"]
    assert rows_of(run) == rows_of(first_run)
    saved, others = (
        {folder.name for folder in (one.path / "checkpoints").iterdir()} for one in (run, first_run)
    )
    assert saved == others


def test_a_run_goes_on_and_says_what_happened(train_with, first_run):
    """Without a worker of a master the weights are those of `--update allreduce`, where nobody is ahead.

    Killed at a chosen step: where a death meets the ranks in a collective, all begin again instead.
    """
    run = train_with("kill:rank=2,step=25", "--update", "downpour", "--staleness", "0")
    assert "rank 2 has died after" in run.job.output
    assert run.status["state"] == "done" and run.status["ranks_lost"] == [2]
    assert run.status["weights_sha256"] == first_run.status["weights_sha256"]
    report = json.loads((run.path / "asynchronous.json").read_text())
    assert [one["rank"] for one in report["lost"]] == [2]
    assert report["updates"] == 60


def test_what_only_the_dead_had_is_read_from_the_newest_checkpoint(train_with, first_run):
    """The one that dies while it writes its shard of the next one, in the background, had a third of the
    optimizer. No process is started."""
    run = train_with("partial:rank=1,step=35", "--update", "zero", "--save-every", "5")
    assert "rank 1 died: 2 ranks restart from the newest checkpoint" in run.job.output
    assert "resumed at step 30" in run.job.output and "done at step 60" in run.job.output
    assert run.status["ranks_lost"] == [1] and run.status["ranks"] == 2
    assert [one["lost"] for one in run.status["recoveries"]] == [[1]]
    assert run.status["weights_sha256"] == first_run.status["weights_sha256"]
    assert [row["step"] for row in run.metrics] == [row["step"] for row in first_run.metrics]


def test_what_only_the_dead_had_is_at_a_neighbour(train_with, first_run):
    """No step is lost, and nothing is read; the metrics are those of a run that nobody left."""
    run = train_with("kill:rank=0,step=37,phase=update", "--update", "zero", "--replicate", "1")
    assert "rank 0 died: 2 ranks restart from peer copies in memory" in run.job.output
    assert "resumed at step 36 from memory" in run.job.output and "done at step 60" in run.job.output
    assert run.status["ranks_lost"] == [0]
    assert run.status["weights_sha256"] == first_run.status["weights_sha256"]
    assert rows_of(run) == rows_of(first_run)


@pytest.mark.extended
@pytest.mark.cold
def test_ranks_that_share_a_model_go_on_in_whole_groups(killed, first_run):
    """Of four ranks, which share two models, two go on; the third waits for the end."""
    run = killed(1, "--tensor-parallel", "2", ranks=4)
    assert run.status["ranks_lost"] == [1] and run.status["ranks"] == 2
    assert run.status["val_loss"] == pytest.approx(first_run.status["val_loss"], abs=1e-5)
