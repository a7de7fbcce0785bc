"""What a run leaves behind, how it goes on after an accident, and what can be done with its model."""

import hashlib
import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tf_dist.checkpoint import store

STEPS = 60
ROWS, T = 8, 16  # of `small`


def read_metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def read_status(path):
    return json.loads((path / "status.json").read_text())


def weights(path, step=STEPS):
    """The weights that a run saved at a step, flat, in order of creation."""
    tensors, _, _ = store.load(path / "checkpoints" / f"step-{step:08d}")
    return np.concatenate([t.astype("<f4").ravel() for name, t in tensors.items() if name[:8] == "weights/"])


def steps_saved(path):
    return [int(folder.name[5:]) for folder in store.listing(path / "checkpoints")]


# What a run leaves behind --------------------------------------------------------------------------


def test_files_of_a_run(first_run):
    names = {entry.name for entry in first_run.path.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "status.json", "tokenizer.json", "checkpoints", "logs"}
    assert not [name for name in names if name.startswith(".")], "something temporary was left"
    assert steps_saved(first_run.path) == [40, 60]  # --keep 2 of 20, 40, 60


def test_status(first_run):
    status = first_run.status
    assert set(status) >= {
        "state", "step", "ranks", "val_loss", "weights_sha256", "failures", "exit_code",
    }  # fmt: skip
    assert (status["state"], status["step"], status["ranks"]) == ("done", STEPS, 2)
    assert (status["failures"], status["exit_code"]) == ([], 0)
    assert status["val_loss"] == first_run.metrics[-1]["val_loss"]
    assert status["weights_sha256"] == hashlib.sha256(weights(first_run.path).tobytes()).hexdigest()


def test_metrics(first_run, prepared_dir):
    rows = first_run.metrics
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert list(row)[:14] == [
            "step", "epoch", "loss", "val_loss", "perplexity", "bits_per_byte", "learning_rate", "grad_norm",
            "tokens", "tokens_per_s", "step_s", "comm_s", "wait_s", "elapsed_s",
        ]  # fmt: skip
        assert (row["val_loss"] is not None) == (row["step"] % 20 == 0)
        assert row["step_s"] > 0
        assert row["comm_s"] >= 0
        assert row["wait_s"] >= 0
    [meta] = [
        json.loads(path.read_text())
        for path in prepared_dir.glob("corpus-*/meta.json")
        if path.parent.name in first_run.job.output
    ]
    steps_per_epoch = -(-(meta["tokens"]["train"] - 1) // T // ROWS)
    assert rows[9]["tokens"] == 10 * ROWS * T
    assert rows[9]["epoch"] == pytest.approx(10 / steps_per_epoch)
    # An epoch has every token but the first as a target, once.
    assert rows[steps_per_epoch - 1]["tokens"] == meta["tokens"]["train"] - 1
    last = rows[-1]
    assert last["perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    nats = last["val_loss"] * (meta["tokens"]["val"] - 1)
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / meta["text_bytes"]["val"])
    assert last["loss"] < rows[0]["loss"]
    assert [row["learning_rate"] for row in rows[:5]] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])


def test_config_is_what_was_asked_for(first_run):
    config = yaml.safe_load((first_run.path / "config.yaml").read_text())
    assert (config["steps"], config["width"], config["dropout"]) == (STEPS, 16, 0.1)
    assert config["run_dir"] == str(first_run.path)
    assert config["vocab_size"] == 257


def test_output_of_each_rank(first_run):
    log = (first_run.path / "logs" / "rank-0000.log").read_text()
    assert "step     60/60" in log
    assert (first_run.path / "logs" / "rank-0001.log").exists()
    # Rank 0 alone speaks: nothing is said twice.
    lines = [line for line in first_run.job.output.splitlines() if line.startswith(("step ", "tf_dist "))]
    assert len(lines) == len(set(lines)) == 1 + STEPS + 3
    assert "2 ranks on 1 node" in lines[0]


# How a run goes on ---------------------------------------------------------------------------------


def test_a_run_with_accidents_is_the_run_without(first_run, small, start_job, run_job, tmp_path, one_error):
    """Stopped by a signal, resumed, killed, its newest checkpoint damaged, resumed: the same weights."""
    path = tmp_path / "run"
    flags = [*small, "--steps", STEPS, "--eval-every", "20", "--save-every", "5", "--run-dir", path]

    # A signal to mpirun, as a job system sends it before the time is up.
    job = start_job(2, "train.py", *flags)
    metrics = path / "metrics.jsonl"
    job.wait_until(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 1)
    os.kill(job.pid, signal.SIGUSR1)
    stopped = job.wait()
    status = read_status(path)
    one_error(stopped, 75, f"saved at step {status['step']} of {STEPS} on a signal")
    assert (status["state"], status["exit_code"], status["failures"]) == ("saved", 75, [])
    assert 2 <= status["step"] < STEPS
    assert steps_saved(path)[-1] == status["step"]
    assert status["weights_sha256"] == hashlib.sha256(weights(path, status["step"]).tobytes()).hexdigest()
    three = shutil.copytree(path, tmp_path / "three")

    # The same line again, and a rank is killed once it has come further.
    job = start_job(2, "train.py", *flags, cold=True)
    job.wait_until(lambda: len(steps_saved(path)) == 3 and steps_saved(path)[0] > status["step"])
    os.kill(job.pid_of_rank(1), signal.SIGKILL)
    killed = job.wait()
    assert killed.code != 0
    assert f"resumed at step {status['step']} from {path}" in killed.output
    assert read_status(path)["state"] != "done"

    # The newest checkpoint is damaged as well. Another folder, --resume from the killed one.
    *_, sound, newest = store.listing(path / "checkpoints")
    damage(newest)
    resumed = run_job(2, "train.py", *flags, "--run-dir", tmp_path / "again", "--resume", path)
    assert resumed.code == 0, resumed.output
    assert resumed.output.count(f"skipping {newest.name}") == 1
    assert f"resumed at step {int(sound.name[5:])} from {sound}" in resumed.output
    assert read_status(tmp_path / "again")["weights_sha256"] == first_run.status["weights_sha256"]

    # On another number of ranks the stopped run goes on as well, and repeats no line of its metrics.
    resumed = run_job(3, "train.py", *flags, "--run-dir", three)
    assert resumed.code == 0, resumed.output
    rows, before = read_metrics(three), first_run.metrics
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for name in ("loss", "val_loss", "tokens", "learning_rate"):
        ours, theirs = ([row[name] or 0 for row in run] for run in (rows, before))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights(three), weights(first_run.path), rtol=0, atol=1e-5)
    assert (read_status(three)["state"], read_status(three)["ranks"]) == ("done", 3)


def damage(path):
    """Flip one bit in the middle of the tensors of a checkpoint."""
    file = path / "shard-0000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_others_read_the_shards_of_a_run(first_run):
    """With safetensors alone: all tensors, as tf_dist reads them."""
    (path, *_) = reversed(store.listing(first_run.path / "checkpoints"))
    wanted, found = store.load(path)[0], {}
    for shard in path.glob("*.safetensors"):
        found |= load_file(shard)
    assert found.keys() == wanted.keys() and len(wanted) > 10
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_a_run_that_is_done_and_one_that_begins_anew(copy_of_first, first_run, launcher, tmp_path):
    flags = [*first_run.flags, "--run-dir", copy_of_first]
    anew = [*flags, "--steps", "2", "--resume", "never"]
    job = launcher.several(0, "train.py", [flags, anew], cwd=tmp_path).wait()
    assert job.code == 0, job.output
    done, began = job.output.split("-----\n")[:2]
    assert "step 60 was already reached" in done
    assert "the files of an earlier run are now in" in began
    earlier = copy_of_first / "earlier-1"
    assert read_metrics(earlier) == first_run.metrics
    assert read_status(earlier)["weights_sha256"] == first_run.status["weights_sha256"]
    assert steps_saved(earlier) == [40, 60]
    assert [row["step"] for row in read_metrics(copy_of_first)] == [1, 2]
    assert steps_saved(copy_of_first) == [2]


# What can be done with its model -------------------------------------------------------------------


def test_generate(first_run, launcher, tmp_path):
    """Greedy text is always the same; drawn text depends on the seed alone."""
    common = ["--run-dir", first_run.path, "--prompt", "the fox", "--tokens", "40", "--progress", "none"]
    asked = [
        [*common, "--temperature", "0", "--seed", "1"],
        [*common, "--temperature", "0", "--seed", "2"],
        [*common, "--seed", "1"],
        [*common, "--seed", "2"],
        [*common, "--top-k", "1", "--seed", "3"],
        [*common, "--top-p", "0.001", "--seed", "4"],
    ]
    texts = []
    for _ in range(2):
        job = launcher.several(0, "generate.py", asked, cwd=tmp_path).wait()
        assert job.code == 0, job.output
        texts.append(job.output.split("\n-----\n")[:-1])
    assert texts[0] == texts[1], "another process wrote another text"
    greedy, greedy_2, seed_1, seed_2, likeliest, nucleus = texts[0]
    assert greedy == greedy_2 == likeliest == nucleus
    assert seed_1 != seed_2
    assert all(text.startswith("the fox") for text in texts[0])
    assert len(greedy) > len("the fox")


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluate(first_run, launcher, tmp_path, corpus, ranks):
    """The numbers of the run's last validation, on any number of ranks; and those of another text."""
    asked = [["--run-dir", first_run.path], ["--run-dir", first_run.path, "--data", corpus]]
    job = launcher.several(ranks, "evaluate.py", asked, cwd=tmp_path).wait()
    assert job.code == 0, job.output
    own, other = map(json.loads, re.findall(r"^\{.*\}$", job.output, re.MULTILINE))
    last = first_run.metrics[-1]
    assert own["step"] == STEPS
    for name in ("val_loss", "val_accuracy", "perplexity", "bits_per_byte"):
        assert own[name] == pytest.approx(last[name], rel=1e-6)
    # All of the corpus: the text that was trained on, and the held-out tenth.
    assert other["val_loss"] == pytest.approx(own["val_loss"], rel=0.05)
    assert other["val_loss"] != own["val_loss"]
