"""Initial weights of another training, or of a file: matched by path and shape, and what is refused."""

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from tf_dist.checkpoint import store
from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.data.tokenizer import ByteTokenizer
from tf_dist.errors import CheckpointError, UsageError
from tf_dist.models.build import build
from tf_dist.optim import optimizers
from tf_dist.run import convert, init_from
from tf_dist.run.load_run import load_run, model_of_run
from tf_dist.run.weight_sources import WeightSource
from tf_dist.training import state_dict
from tf_dist.training.trainer import Trainer

CONFIG = Config(layers=1, width=16, heads=2, seq_len=8, vocab_size=256, seed=3)
IDS = np.random.default_rng(1).integers(0, 256, (2, 8)).astype(np.int32)


def trained(folder, config, **facts):
    """A run whose weights are not those of its seed."""
    folder.mkdir()
    (folder / "config.yaml").write_text(config.as_yaml())
    ByteTokenizer().save(folder / "tokenizer.json")
    run = model_of_run(str(folder))
    for number, variable in enumerate(run.model.weights):
        values = np.random.default_rng(number).normal(size=variable.shape) / 4
        variable.assign(values.astype(np.float32))
    state_dict.save(convert._trainer_of(run), folder / "checkpoints", 1, {**convert._facts(run), **facts})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "plain", CONFIG)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    config = dataclasses.replace(CONFIG, lora_rank=2, lora_alpha=4.0)
    return trained(tmp_path_factory.mktemp("runs") / "lora", config)


def resolved(config, facts=None):
    """The options of a run that begins, or resumes."""
    return dataclasses.replace(config, **init_from.pinned(config, facts))


def initialized(path, tokens=256, **options):
    """A trainer that begins with these weights."""
    config = dataclasses.replace(CONFIG, init_from=str(path), **options)
    config = resolved(config)
    model = build(config)
    trainer = Trainer(
        model, optimizers.build(config, model, 9), SerialComm(), global_batch_size=2, micro_batch_size=2,
        seq_len=config.seq_len, autotune="off",
    )  # fmt: skip
    init_from.initialize(trainer, config, SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=tokens)))
    return model


def weights(model):
    return {v.path: np.asarray(v.value) for v in model.weights}


def logits(model):
    return np.asarray(model(IDS, training=False))


def close(found, wanted):
    """Within 1e-5 of the largest logit."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))


def same(found, wanted, but=()):
    assert found.keys() >= wanted.keys()
    for path in wanted:
        assert (found[path] == wanted[path]).all() == (path not in but), path


@pytest.mark.parametrize("ending", ["", "checkpoint", *convert.KINDS])
def test_all_weights_of_a_run_a_checkpoint_and_a_file(run, tmp_path, ending, caplog):
    caplog.set_level(logging.INFO)
    path = run if not ending else store.newest(run / "checkpoints")
    if ending.startswith("."):
        path = tmp_path / f"model{ending}"
        convert.convert(run, path)
    same(weights(initialized(path)), weights(load_run(str(run)).model))
    assert "initial weights: 16 of 16 weights, from " in caplog.text


@pytest.mark.parametrize("ending", ["", ".safetensors", ".weights.h5"])
def test_a_new_head_on_an_old_body(run, tmp_path, ending, caplog):
    """Here the body has another head: adapters, and a table of outputs of its own."""
    caplog.set_level(logging.INFO)
    path = run
    if ending:
        path = tmp_path / f"model{ending}"
        convert.convert(run, path)
    if ending == ".weights.h5":  # by layer: an embedding with two tables is another layer
        with pytest.raises(CheckpointError, match="layer embedding has the weights"):
            initialized(path, tie_embeddings=False)
        return
    found = weights(initialized(path, tie_embeddings=False))
    same(found, weights(load_run(str(run)).model))
    assert "16 of 17 weights; 1 new: embedding/reverse_embeddings, from " in caplog.text


def test_what_is_left_over_and_what_begins_anew(run, caplog):
    caplog.set_level(logging.INFO)
    wanted = weights(load_run(str(run)).model)
    found = weights(initialized(run, init_except="final_norm"))
    same(found, wanted, but=("final_norm/gamma", "final_norm/beta"))
    assert "14 of 16 weights; 2 new: final_norm/gamma, final_norm/beta; 2 left over there" in caplog.text


def test_frozen_weights_that_are_not_there_are_told(run, caplog):
    initialized(run, init_except="embedding", freeze="embedding,positions")
    assert "1 weights are frozen and not in" in caplog.text and "'*,!embedding/embeddings'" in caplog.text


@pytest.mark.parametrize("ending", ["", ".safetensors"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 32}, r"embedding/embeddings is \[256, 16\] there, and \[256, 32\] in this model"),
        ({"seq_len": 9}, r"positions/positions is \[8, 16\] there, and \[9, 16\]"),
        ({"vocab_size": 255}, r"embedding/embeddings is \[256, 16\] there, and \[255, 16\]"),
        ({"model": "lstm", "init_except": "embedding"}, "none of its weights .* is one of this model"),
        ({"init_except": "head"}, "--init-except 'head' matches no weight"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(run, tmp_path, ending, options, said):
    path = run
    if ending:
        path = tmp_path / f"model{ending}"
        convert.convert(run, path)
    with pytest.raises((CheckpointError, UsageError), match=said):
        initialized(path, **options)


def test_another_shape_in_a_file_of_keras_is_named(run, tmp_path):
    path = tmp_path / "model.weights.h5"
    convert.convert(run, path)
    with pytest.raises(CheckpointError, match=r"positions/vars/0 is \[8, 16\] there, \[9, 16\] in this"):
        initialized(path, seq_len=9)


def test_heads_of_another_width_are_refused(run):
    with pytest.raises(CheckpointError, match=r"trained with 2 attention heads, and these are 4.*--heads 2"):
        initialized(run, heads=4)


@pytest.mark.parametrize("vocab_size", [259, 253])
def test_special_tokens_behind_the_vocabulary(run, vocab_size, caplog):
    """Rows of tokens that both have are loaded; others keep their initial values."""
    caplog.set_level(logging.INFO)
    config = dataclasses.replace(CONFIG, vocab_size=vocab_size)
    fresh, wanted = weights(build(config)), weights(load_run(str(run)).model)
    found = weights(initialized(run, tokens=250, vocab_size=vocab_size))
    both, name = min(vocab_size, 256), "embedding/embeddings"
    np.testing.assert_array_equal(found[name][:both], wanted[name][:both])
    np.testing.assert_array_equal(found[name][both:], fresh[name][both:])
    assert f"tokens {vocab_size - 256:+d} in embedding/embeddings" in caplog.text


def test_adapters_go_on_as_adapters_or_are_merged(lora_run, tmp_path):
    one = initialized(lora_run, lora_rank=2, lora_alpha=4.0)
    plain = initialized(lora_run)
    assert len(weights(plain)) == 16 and len(weights(one)) == 24
    close(logits(plain), logits(one))
    for ending in (".safetensors", ".weights.h5"):  # as export writes them
        path = tmp_path / f"model{ending}"
        convert.convert(lora_run, path)
        same(weights(initialized(path)), weights(plain))
    with pytest.raises(CheckpointError, match=r"adapters are scaled by 2, and here by 1 .*--lora-alpha"):
        initialized(lora_run, lora_rank=2, lora_alpha=2.0)


def test_export_merges_adapters(lora_run, tmp_path):
    path = tmp_path / "model.keras"
    convert.convert(lora_run, path)
    opened = keras.models.load_model(path)
    close(logits(opened), logits(load_run(str(lora_run)).model))


def test_a_damaged_checkpoint_and_a_damaged_file_are_refused(run, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (shard,) = (copy / "checkpoints").glob("step-*/shard-*")
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        initialized(next((copy / "checkpoints").glob("step-*")))
    for name in ("x.safetensors", "x.weights.h5"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(CheckpointError, match=f"--init-from .*{name}"):
            initialized(tmp_path / name)


@pytest.mark.parametrize("name", ["none", "none.safetensors", "empty"])
def test_paths_that_lead_nowhere(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"--init-from .*{name}"):
        resolved(dataclasses.replace(CONFIG, init_from=str(tmp_path / name)), None)


def test_a_run_is_pinned_to_a_checkpoint_with_its_tokenizer(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    given = dataclasses.replace(CONFIG, init_from=run.name)
    found = resolved(given)
    step = store.newest(run / "checkpoints")
    assert Path(found.init_from) == step.resolve()
    assert found.tokenizer == str((run / "tokenizer.json").resolve())
    # A resumed run keeps to what it began with, and does not ask whether that is still there.
    facts = {
        "config": dataclasses.replace(found, init_from="/gone/step-1", tokenizer="/gone/t.json").as_dict()
    }
    again = resolved(given, facts)
    assert (again.init_from, again.tokenizer) == ("/gone/step-1", "/gone/t.json")
    assert resolved(given, {"config": CONFIG.as_dict()}).init_from == ""
    assert resolved(CONFIG, None) == CONFIG


def test_another_tokenizer_is_refused(run, tmp_path):
    config = resolved(dataclasses.replace(CONFIG, init_from=str(run)))
    from tf_dist.data.prepared_dataset import sha256_of_file

    own = sha256_of_file(run / "tokenizer.json")
    init_from.check_tokenizer(config, SimpleNamespace(meta={"tokenizer_sha256": own}))
    with pytest.raises(CheckpointError, match="its weights know another tokenizer"):
        init_from.check_tokenizer(config, SimpleNamespace(meta={"tokenizer_sha256": "0" * 64}))


def test_a_plan_counts_everything():
    source = WeightSource({"a/k": (2, 3), "b/k": (4,), "x/k": (1,)}, None, "there")
    model = {"a/k": ((2, 3), False), "b/k": ((4,), True), "c/k": ((5,), False), "d/k": ((6,), True)}
    made = init_from.plan(model, source, ["b/k"], 9)
    assert (made.loaded, made.new, made.left) == (["a/k"], ["b/k", "c/k", "d/k"], ["b/k", "x/k"])
    assert made.frozen == ["c/k"] and made.longer == {}
    assert str(made) == "1 of 4 weights; 3 new: b/k, c/k, d/k; 2 left over there: b/k, x/k"
