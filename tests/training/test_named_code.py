"""Code of a user runs where the command line names it, and never because a run folder does."""

import sys

import pytest

from tf_dist.__main__ import main
from tf_dist.config import Config
from tf_dist.data.tokenizer import ByteTokenizer
from tf_dist.errors import CheckpointError, LaunchError, UsageError
from tf_dist.flags import from_command_line
from tf_dist.run import convert
from tf_dist.run.load_run import load_run, model_of_run
from tf_dist.training import state_dict

BUILD = """
open("executed", "w").close()
from tf_dist.models import lstm
def build(config):
    return lstm.build(config.vocab_size, config.seq_len, config.layers, config.width)
"""
NAME = "runs.gift.weights:build"


@pytest.fixture
def gift(tmp_path, monkeypatch):
    """A run of somebody else in the current folder, whose file of options names a module that lies in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "runs" / "gift"
    folder.mkdir(parents=True)
    ByteTokenizer().save(folder / "tokenizer.json")
    own = Config(model="lstm", layers=1, width=16, seq_len=8, vocab_size=257)
    (folder / "config.yaml").write_text(own.as_yaml())
    loaded = model_of_run(str(folder))
    state_dict.save(convert._trainer_of(loaded), folder / "checkpoints", 1, convert._facts(loaded))
    (folder / "config.yaml").write_text(own.as_yaml().replace("model: lstm", f"model: {NAME}"))
    (folder / "weights.py").write_text(BUILD)
    yield folder
    for name in [name for name in sys.modules if name == "runs" or name.startswith("runs.")]:
        del sys.modules[name]


def test_without_a_word_of_the_user_nothing_runs(gift, tmp_path, capsys):
    refusal = f"says that the model is made by '{NAME}'.*If you trust that code, add --model {NAME}$"
    for read in (load_run, model_of_run):
        with pytest.raises(LaunchError, match=refusal) as caught:
            read("runs/gift")
        assert caught.value.exit_code == 78
    assert main(["checkpoint", "convert", "runs/gift", "x.weights.h5"]) == 78
    assert f"add --model {NAME}" in capsys.readouterr().err
    with pytest.raises(LaunchError, match=refusal):
        from_command_line(["--config", "runs/gift/config.yaml", "--run-dir", "runs/gift"], "")
    (tmp_path / "link.yaml").symlink_to("runs/gift/config.yaml")
    with pytest.raises(LaunchError, match=refusal):
        from_command_line(["--config", "link.yaml"], "")
    assert not (tmp_path / "executed").exists() and str(tmp_path) not in sys.path


TASK = "runs.gift.weights:Task"


def test_neither_does_a_task(gift, tmp_path, capsys):
    """It makes the rows, and is imported wherever a model of the run is built."""
    text = (gift / "config.yaml").read_text().replace(NAME, "lstm")
    (gift / "config.yaml").write_text(text.replace("task: causal-lm", f"task: {TASK}"))
    refusal = f"says that the task is '{TASK}'.*If you trust that code, add --task {TASK}$"
    for read in (load_run, model_of_run):
        with pytest.raises(LaunchError, match=refusal):
            read("runs/gift")
        with pytest.raises(LaunchError, match="not 'other:Task'"):
            read("runs/gift", task="other:Task")
    assert main(["checkpoint", "convert", "runs/gift", "x.weights.h5"]) == 78
    assert f"add --task {TASK}" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
    with pytest.raises(UsageError, match="has no attribute 'Task'"):
        load_run("runs/gift", task=TASK)
    assert (tmp_path / "executed").exists(), "the word of the user was not taken"


def test_another_name_is_not_the_word(gift, tmp_path):
    with pytest.raises(LaunchError, match="not 'other:build'"):
        load_run("runs/gift", model="other:build")
    with pytest.raises(LaunchError, match="not 'lstm'"):
        from_command_line(["--config", "runs/gift/config.yaml", "--model", "lstm", "--layers", "3"], "")
    assert not (tmp_path / "executed").exists()


def test_with_the_word_of_the_user(gift, tmp_path, capsys):
    assert load_run("runs/gift", model=NAME).step == 0
    assert (tmp_path / "executed").exists()
    assert sys.path[-1] == str(tmp_path)  # behind what is installed
    assert main(["checkpoint", "convert", "runs/gift", "x.weights.h5", "--model", NAME]) == 0
    config, _ = from_command_line(["--config", "runs/gift/config.yaml", "--model", NAME], "")
    assert config.model == NAME


def test_a_model_of_ours_takes_no_name(gift):
    text = (gift / "config.yaml").read_text().replace(NAME, "lstm")
    (gift / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match="the model of this run is lstm"):
        load_run("runs/gift", model=NAME)
    assert load_run("runs/gift").step == 0


def test_a_file_that_the_user_wrote_is_the_users_word(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: mine.models:build\n")
    assert from_command_line(["--config", str(path)], "")[0].model == "mine.models:build"


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json"])
def test_what_lies_in_a_run_is_not_reached_through_a_link(gift, tmp_path, name):
    (gift / name).rename(tmp_path / "elsewhere")
    (gift / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises((UsageError, CheckpointError, ValueError), match="it is a link, not a regular file"):
        load_run("runs/gift", model=NAME)


def test_options_of_a_run_are_meant_for_its_folder(gift, tmp_path):
    """Whoever sends a run, or moves it, names no other folder, and nothing is begun anew by them."""
    text = (gift / "config.yaml").read_text().replace(NAME, "lstm")
    text = text.replace("run_dir: ''", "run_dir: runs/mine").replace("resume: auto", "resume: never")
    (gift / "config.yaml").write_text(text)
    config, _ = from_command_line(["--config", "runs/gift/config.yaml"], "")
    assert (config.run_dir, config.resume, config.model) == ("runs/gift", "auto", "lstm")
    flags = ["--run-dir", "runs/other", "--resume", "never"]
    config, _ = from_command_line(["--config", "runs/gift/config.yaml", *flags], "")
    assert (config.run_dir, config.resume) == ("runs/other", "never")
    (tmp_path / "mine.yaml").write_text(text)
    config, _ = from_command_line(["--config", "mine.yaml"], "")
    assert (config.run_dir, config.resume) == ("runs/mine", "never")
