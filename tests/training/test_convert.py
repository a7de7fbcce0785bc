"""Weights that leave a run and come into one, bit for bit; of a foreign file nothing else is used."""

import json
import struct
import sys

import numpy as np
import pytest

from tf_dist.__main__ import main
from tf_dist.config import Config
from tf_dist.data.tokenizer import ByteTokenizer
from tf_dist.errors import CheckpointError
from tf_dist.training import checkpoint, convert, state
from tf_dist.training.load import load_run, model_of_run

CONFIG = Config(layers=1, width=16, heads=2, seq_len=8, vocab_size=256, dropout=0.0, seed=3)


@pytest.fixture
def run(tmp_path):
    """A run that has saved weights which are not those of its seed."""
    folder = tmp_path / "run"
    prepare(folder)
    loaded = model_of_run(str(folder))
    for number, variable in enumerate(loaded.model.weights):
        variable.assign(np.random.default_rng(number).normal(size=variable.shape).astype(np.float32))
    state.save(convert._trainer_of(loaded), folder / "checkpoints", 1, convert._facts(loaded))
    return folder


def prepare(folder):
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.as_yaml())
    ByteTokenizer().save(folder / "tokenizer.json")


def weights(folder):
    return [np.asarray(variable.value) for variable in load_run(str(folder)).model.weights]


@pytest.mark.parametrize("ending", convert.KINDS)
def test_there_and_back(run, tmp_path, ending, capsys):
    file, other = tmp_path / f"model{ending}", tmp_path / "other"
    prepare(other)
    assert main(["checkpoint", "convert", str(run), str(file)]) == 0
    assert main(["checkpoint", "convert", str(file), str(other)]) == 0
    assert "as step 0 of a new run" in capsys.readouterr().out
    for ours, theirs in zip(weights(run), weights(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    _, facts, step = checkpoint.load(other / "checkpoints" / "step-00000000")
    assert step == 0
    state.check_same_run(facts, CONFIG, "any data", print)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def test_names_in_a_file_are_those_of_the_model(run, tmp_path):
    from safetensors import safe_open

    convert.convert(run, tmp_path / "model.safetensors")
    model = load_run(str(run)).model
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert set(file.keys()) == {variable.path for variable in model.weights}
        assert file.metadata()["step"] == "0"


@pytest.mark.parametrize("ending", convert.KINDS)
@pytest.mark.parametrize("damage", ["rubbish", "cut", "absent", "another model"])
def test_what_does_not_fit_is_refused(run, tmp_path, ending, damage):
    file, other = tmp_path / f"model{ending}", tmp_path / "other"
    prepare(other)
    convert.convert(run, file)
    if damage == "rubbish":
        file.write_bytes(b"nothing of the kind" * 100)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-700])
    elif damage == "absent":
        file.unlink()
    else:
        (other / "config.yaml").write_text(Config(**{**CONFIG.as_dict(), "width": 32}).as_yaml())
    with pytest.raises(CheckpointError, match="does not hold the weights of this model"):
        convert.convert(file, other)
    assert not (other / "checkpoints").exists()


def test_a_header_that_promises_too_much_takes_no_memory(run, tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    file = tmp_path / "huge.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError):
        convert.read(file, load_run(str(run)).model)


def test_a_run_that_has_checkpoints_keeps_them(run, tmp_path):
    convert.convert(run, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not empty"):
        convert.convert(tmp_path / "model.safetensors", run)


@pytest.mark.parametrize("words", [["a", "b"], ["a.keras", "b.safetensors"], ["a"]])
def test_one_is_a_file_and_one_a_run(words, capsys):
    assert main(["checkpoint", "convert", *words]) == 64
    assert "error: convert" in capsys.readouterr().err


def test_a_package_that_is_not_there_is_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    assert main(["checkpoint", "convert", str(run), str(tmp_path / "x.safetensors")]) == 69
    assert "pip install safetensors" in capsys.readouterr().err
