"""SavedModel and ONNX: the logits of the run's model, by TensorFlow and by onnxruntime."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from strong_weights import strong

from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.models.build import build
from tf_dist.run.export_graph import export_graph

V, T = 23, 12
LLAMA = {"normalization": "rmsnorm", "activation": "swiglu", "position_embedding": "rope", "bias": "none"}
MODELS = {
    "gpt2": {},
    "llama": {**LLAMA, "kv_heads": 2, "qk_norm": True, "sliding_window": 5},
    "lstm": {"model": "lstm"},
}
IDS = np.random.default_rng(1).integers(0, V, (3, T)).astype(np.int32)


def loaded(name):
    config = Config(vocab_size=V, seq_len=T, width=16, heads=4, layers=2, **MODELS[name])
    return SimpleNamespace(config=config, model=strong(build(config)), step=7)


def error(found, run):
    wanted = np.asarray(run.model(IDS))
    return np.abs(found - wanted).max() / wanted.std()


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_has_the_logits(name, tmp_path):
    run = loaded(name)
    assert "tokens (B, 12) int32 -> logits" in export_graph(run, tmp_path / "one.savedmodel")
    loaded_again = tf.saved_model.load(str(tmp_path / "one.savedmodel"))
    assert error(np.asarray(loaded_again.serve(tf.constant(IDS))), run) < 1e-5
    with pytest.raises(UsageError, match="is there: choose another"):
        export_graph(run, tmp_path / "one.savedmodel")
    assert [path.name for path in tmp_path.iterdir()] == ["one.savedmodel"]


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_has_the_logits(name, tmp_path):
    pytest.importorskip("tf2onnx", reason="pip install tf2onnx")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    run = loaded(name)
    export_graph(run, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"tokens": IDS})
    assert error(found, run) < 1e-5
