"""Early stopping, reports, callbacks, presets and dry runs, as a user asks for them."""

import csv
import json


def status(folder):
    return json.loads((folder / "status.json").read_text())


CALLBACKS = """
import keras

class Count(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        print("seen", batch, flush=True)

def made(config):
    return [Count()] if config.steps else []
"""


def test_a_run_that_no_longer_improves_ends_and_is_reported(launcher, small, tmp_path):
    (tmp_path / "watching.py").write_text(CALLBACKS)
    still = ["--learning-rate", "0", "--min-learning-rate", "0", "--weight-decay", "0"]
    flags = [*small, *still, "--preset", "llama", "--heads", "2", "--kv-heads", "1", "--steps", "40"]
    flags += ["--eval-every", "2", "--early-stopping", "val_loss:3", "--report-to", "csv,tensorboard"]
    flags += ["--callbacks", "watching:made", "--run-dir", "run"]
    run = launcher.start(2, "train.py", *flags, cwd=tmp_path).wait()
    assert run.code == 0, run.output
    # The first validation is the best one; three more are not better.
    assert "stopped      early at step 8 of 40: val_loss has not been better than" in run.output
    assert run.output.count("seen 0") >= 2
    found = status(tmp_path / "run")
    assert (found["state"], found["step"]) == ("done", 8)
    lines = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [int(line["step"]) for line in lines] == list(range(1, 9))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    again = launcher.start(2, "train.py", *flags, cwd=tmp_path).wait()  # it is over, and stays so
    assert again.code == 0, again.output
    assert status(tmp_path / "run")["step"] == 8
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "normalization: rmsnorm" in config and "position_embedding: rope" in config


def test_a_dry_run_measures_and_writes_nothing(launcher, small, tmp_path):
    run = launcher.start(2, "train.py", *small, "--dry-run", "--steps", "5000", cwd=tmp_path).wait()
    assert run.code == 0, run.output
    for word in ("parameters", "compilation", "tokens/s", "5,000 steps:", "on the largest of 2 ranks"):
        assert word in run.output
    assert not (tmp_path / "runs").exists()


def test_what_continues_is_typed(launcher, first_run, tmp_path):
    command = f"printf 'the\\n\\n' | python -m tf_dist chat {first_run.path} --tokens 5 --temperature 0"
    run = launcher.start_command(["bash", "-c", command], cwd=tmp_path).wait()
    assert run.code == 0, run.output
