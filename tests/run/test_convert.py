"""Weights that leave a run and come into one, bit for bit; of a foreign file nothing else is used."""

import json
import os
import struct
import subprocess
import sys

import keras
import numpy as np
import pytest

from tf_dist.__main__ import main
from tf_dist.checkpoint import store
from tf_dist.config import Config
from tf_dist.data.tokenizer import ByteTokenizer
from tf_dist.errors import CheckpointError
from tf_dist.run import convert
from tf_dist.run.load_run import load_run, model_of_run
from tf_dist.training import state_dict

CONFIG = Config(layers=1, width=16, heads=2, seq_len=8, vocab_size=256, dropout=0.0, seed=3)


# Opens files as somebody who has never heard of tf_dist, and writes what the models compute.
OPENED_BY_KERAS_ALONE = """
import sys
sys.modules["tf_dist"] = None
import keras, numpy as np
ids = np.load(sys.argv[1])
for path in sys.argv[2:]:
    model = keras.models.load_model(path)
    np.save(path + ".npy", np.asarray(keras.ops.cast(model(ids, training=False), "float32")))
"""
MODELS = {
    "transformer": {},
    "transformer of two layers, not tied": {"layers": 2, "tie_embeddings": False, "dropout": 0.1},
    "lstm": {"model": "lstm", "layers": 2},
    "lstm, not tied": {"model": "lstm", "tie_embeddings": False, "dropout": 0.1},
    "bfloat16": {"precision": "bfloat16"},
}
USERS_MODELS = """
import keras
from keras import layers
from tf_dist.models.fast_lstm import LSTM

class Subclassed(keras.Model):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.build_it = inner, lambda: None
        self.embedding, self.head = layers.Embedding(256, 8), layers.Dense(256)
    def call(self, x):
        return self.head(self.embedding(x))

def subclassed(config):
    return Subclassed(object())

class Nameless(layers.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function
    def call(self, x):
        return self.function(x)

def without_config(config):
    x = keras.Input((config.seq_len,), dtype="int32")
    return keras.Model(x, layers.Dense(256)(Nameless(lambda y: 2 * y)(layers.Embedding(256, 8)(x))))

class Doubled(layers.Layer):
    def call(self, x):
        return 2 * x

def with_own_layer(config):
    x = keras.Input((config.seq_len,), dtype="int32")
    lstm = LSTM(8, return_sequences=True)
    inner = keras.Sequential([layers.Input((config.seq_len, 8)), lstm], name="inner")
    return keras.Model(x, layers.Dense(256)(Doubled()(inner(layers.Embedding(256, 8)(x)))))
"""


@pytest.fixture
def run(tmp_path):
    """A run that has saved weights which are not those of its seed."""
    return trained(tmp_path / "run", CONFIG)


def trained(folder, config):
    prepare(folder)
    (folder / "config.yaml").write_text(config.as_yaml())
    loaded = model_of_run(str(folder), config.model if ":" in config.model else "")
    for number, variable in enumerate(loaded.model.weights):
        variable.assign(np.random.default_rng(number).normal(size=variable.shape).astype(np.float32))
    state_dict.save(convert._trainer_of(loaded), folder / "checkpoints", 1, convert._facts(loaded))
    return folder


def prepare(folder):
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.as_yaml())
    ByteTokenizer().save(folder / "tokenizer.json")


def weights(folder, code=""):
    return [np.asarray(variable.value) for variable in load_run(str(folder), model=code).model.weights]


@pytest.mark.parametrize("ending", convert.KINDS)
def test_there_and_back(run, tmp_path, ending, capsys):
    file, other = tmp_path / f"model{ending}", tmp_path / "other"
    prepare(other)
    assert main(["checkpoint", "convert", str(run), str(file)]) == 0
    assert main(["checkpoint", "convert", str(file), str(other)]) == 0
    assert "as step 0 of a new run" in capsys.readouterr().out
    for ours, theirs in zip(weights(run), weights(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    _, facts, step = store.load(other / "checkpoints" / "step-00000000")
    assert step == 0
    state_dict.check_same_run(facts, CONFIG, "any data")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def changed(**options):
    return Config(**{**CONFIG.as_dict(), **options})


def test_keras_alone_opens_what_is_written(tmp_path):
    ids = np.random.default_rng(5).integers(0, 256, (3, CONFIG.seq_len)).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids)
    wanted = {}
    for number, options in enumerate(MODELS.values()):
        folder, path = tmp_path / str(number), tmp_path / f"{number}.keras"
        trained(folder, changed(**options))
        assert "opens it, without tf_dist" in convert.convert(folder, path)
        model = load_run(str(folder)).model
        wanted[str(path)] = np.asarray(keras.ops.cast(model(ids, training=False), "float32"))
    words = [sys.executable, "-c", OPENED_BY_KERAS_ALONE, tmp_path / "ids.npy", *wanted]
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(words, check=True, cwd=tmp_path, env=elsewhere, timeout=300)
    for (path, logits), (name, options) in zip(wanted.items(), MODELS.items(), strict=True):
        tolerance = 0.1 if "precision" in options else 1e-5
        found = np.load(path + ".npy")
        np.testing.assert_allclose(
            found, logits, rtol=0, atol=tolerance * max(1, np.abs(logits).max()), err_msg=name
        )


def test_files_of_our_own_layers_are_still_read(run, tmp_path):
    other = tmp_path / "other"
    prepare(other)
    load_run(str(run)).model.save(tmp_path / "of-an-older-version.keras")
    convert.convert(tmp_path / "of-an-older-version.keras", other)
    for ours, theirs in zip(weights(run), weights(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_rebuilt_model_that_computes_something_else_is_not_written(run, tmp_path, monkeypatch):
    from tf_dist.models import stock

    monkeypatch.setattr(stock, "_attend", lambda layer, x, **more: layer(x, x, **more))
    counterpart = stock.COUNTERPARTS[stock.transformer.CausalSelfAttention]
    monkeypatch.setitem(
        stock.COUNTERPARTS, stock.transformer.CausalSelfAttention, counterpart._replace(call=stock._attend)
    )
    with pytest.raises(CheckpointError, match="other logits"):
        convert.convert(run, tmp_path / "model.keras")
    assert not (tmp_path / "model.keras").exists()


@pytest.fixture
def users_models(tmp_path, monkeypatch):
    (tmp_path / "users_models.py").write_text(USERS_MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_models", raising=False)
    return lambda name: changed(model=f"users_models:{name}")


@pytest.mark.parametrize("name", ["subclassed", "without_config"])
def test_a_model_that_keras_cannot_describe_is_one_error(users_models, tmp_path, name, capsys):
    folder, code = trained(tmp_path / "run", users_models(name)), f"users_models:{name}"
    assert main(["checkpoint", "convert", str(folder), str(tmp_path / "model.keras"), "--model", code]) == 64
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and ".safetensors" in said and "get_config" in said
    assert not (tmp_path / "model.keras").exists()
    prepare(tmp_path / "other")
    (tmp_path / "other" / "config.yaml").write_text(users_models(name).as_yaml())
    for file in ("model.weights.h5", "model.safetensors"):  # the ways out that were named
        keras.utils.clear_session()  # names of layers are counted anew, as in another process
        convert.convert(folder, tmp_path / file, model=code)
        keras.utils.clear_session()
        convert.read(tmp_path / file, model_of_run(str(tmp_path / "other"), code).model)


def test_classes_that_a_file_needs_are_named(users_models, tmp_path):
    folder, code = trained(tmp_path / "run", users_models("with_own_layer")), "users_models:with_own_layer"
    said = convert.convert(folder, tmp_path / "model.keras", model=code)
    assert "custom_objects has users_models.Doubled" in said and "LSTM" not in said
    read = model_of_run(str(folder), code).model
    convert.read(tmp_path / "model.keras", read)
    for ours, theirs in zip(weights(folder, code), read.weights, strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs.value))


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
