"""Model folders both ways, with `transformers` on PyTorch as the other side; no hub is reached.

`make torch` builds the environment of the other side, .venv-torch.
"""

import dataclasses
import json
import os
import subprocess

import numpy as np
import pytest
from launching import ROOT
from safetensors.numpy import load_file

from tf_dist.config import Config
from tf_dist.data.tokenizer import ByteTokenizer
from tf_dist.huggingface.folder import open_folder
from tf_dist.huggingface.options_of_folder import options_of_folder
from tf_dist.huggingface.tokenizer_json import tokenizer_json

PYTHON = ROOT / ".venv-torch" / "bin" / "python"
PEER = ROOT / "tests" / "huggingface" / "peer.py"
V, T = 257, 24
SIZES = {"vocab_size": V, "initializer_range": 0.2}
GPT2 = {**SIZES, "n_positions": T, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    **SIZES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
MODELS = {
    "gpt2": ("gpt2", GPT2),
    "llama": ("llama", LLAMA),
    "llama, stretched": (
        "llama",
        {**LLAMA, **BIASED, "num_key_value_heads": 4, "rope_parameters": STRETCHED},
    ),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 7}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 16}),
}


def peer(*jobs):
    """Let the other side do some jobs (tests/huggingface/peer.py)."""
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, PEER, json.dumps(jobs, default=str)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def transformers():
    if not PYTHON.exists():
        pytest.skip("no .venv-torch: make torch")
    found = subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("no transformers in .venv-torch: make torch")


@pytest.fixture(scope="module")
def outside(transformers, tmp_path_factory):
    """``outside[name]``: the folder of a model with random weights that `transformers` has made."""
    home = tmp_path_factory.mktemp("outside")
    folders = {name: home / str(number) for number, name in enumerate(MODELS)}
    np.save(home / "ids.npy", np.random.default_rng(1).integers(0, V, (3, T)))
    jobs = []
    for name, (kind, fields) in MODELS.items():
        saving = {"max_shard_size": "40KB"} if name == "llama" else {}
        jobs += [["make", kind, folders[name], fields, saving]]
        jobs += [["logits", folders[name], home / "ids.npy", folders[name] / "logits.npy"]]
    peer(*jobs)
    for folder in folders.values():
        (folder / "tokenizer.json").write_text(tokenizer_json(ByteTokenizer()))
    return folders


def error(found, wanted):
    """The largest difference of logits, relative to their spread."""
    return float(np.abs(found - wanted).max() / wanted.std())


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_outside_model(outside, name):
    from tf_dist.models.build import build

    folder = outside[name]
    options = options_of_folder(folder, Config(vocab_size=V, seq_len=T), True)
    config = dataclasses.replace(Config(vocab_size=V, seq_len=T), **options)
    model, there = build(config), open_folder(folder, config)
    for variable in model.weights:
        variable.assign(there.read(variable.path))
    ids = np.load(folder.parent / "ids.npy").astype(np.int32)
    assert error(np.asarray(model(ids)), np.load(folder / "logits.npy")) < 1e-5


# Ranks and grid that read a folder, each its shards, and write it again.
GRIDS = {
    "gpt2": (2, ["--tensor-parallel", "2"]),
    "llama": (2, ["--pipeline-parallel", "2"]),
    "llama, stretched": (0, []),
    "mistral": (2, ["--strategy", "zero", "--zero-stage", "3"]),
    "qwen2": (2, ["--tensor-parallel", "1"]),
    "qwen3": (2, ["--tensor-parallel", "2"]),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.extended] * (n != "llama")) for n in MODELS],
)
def test_there_and_back(outside, launcher, corpus, prepared_dir, name, tmp_path):
    """A step of no length on a grid, and an export: the same bytes; a text goes on as theirs does."""
    ranks, grid = GRIDS[name]
    flags = [
        "--data",
        corpus,
        "--prepared-dir",
        prepared_dir,
        "--init-from",
        outside[name],
        "--run-dir",
        "run",
    ]
    flags += ["--steps", "1", "--learning-rate", "0", "--min-learning-rate", "0", "--seq-len", T]
    flags += ["--global-batch-size", "4", "--eval-every", "0", *grid]
    run = launcher.start(ranks, "train.py", *map(str, flags), cwd=tmp_path).wait()
    assert run.code == 0, run.output
    assert "initial weights:" in run.output and "left over" not in run.output
    done = launcher.start(0, "-m", "tf_dist", "checkpoint", "export", "run", "back", cwd=tmp_path).wait()
    assert done.code == 0, done.output
    before, after = tensors(outside[name]), tensors(tmp_path / "back")
    assert before.keys() - {"lm_head.weight"} == after.keys() - {"lm_head.weight"}
    for tensor, array in after.items():
        assert array.tobytes() == before[tensor].tobytes(), tensor

    prompt, tokens = "The cat", 12
    ids = ByteTokenizer().encode(prompt)
    np.save(tmp_path / "prompt.npy", ids[None].astype(np.int64))
    files = {name: tmp_path / f"{name}.npy" for name in ("there", "back", "made", "encoded")}
    peer(
        ["logits", outside[name], tmp_path / "prompt.npy", files["there"]],
        ["logits", tmp_path / "back", tmp_path / "prompt.npy", files["back"]],
        ["generate", tmp_path / "back", tmp_path / "prompt.npy", tokens, files["made"]],
        ["encode", tmp_path / "back", prompt, files["encoded"]],
    )
    found = {name: np.load(file) for name, file in files.items()}
    np.testing.assert_array_equal(found["there"], found["back"])
    assert found["encoded"].tolist() == ids.tolist()
    # Two prompts: a line of JSON each, in which bytes are not made readable for a terminal.
    words = ["--prompt", prompt, "--prompt", prompt, "--temperature", "0", "--tokens", str(tokens)]
    said = launcher.start(0, "-m", "tf_dist", "generate", "--run-dir", "run", *words, cwd=tmp_path).wait()
    assert said.code == 0, said.output
    lines = [json.loads(line) for line in said.output.splitlines() if line.startswith("{")]
    assert [line["prompt"] + line["text"] for line in lines] == [ByteTokenizer().decode(found["made"][0])] * 2


def test_what_cannot_be_is_refused_before_memory(outside, launcher, small, one_error, tmp_path):
    flags = ["train.py", *small, "--init-from", str(outside["gpt2"])]
    wrong = launcher.start(2, *flags, "--run-dir", "run", cwd=tmp_path).wait()  # `small` says other sizes
    one_error(wrong, 64, "leave it out")
    assert not (tmp_path / "run").exists()
