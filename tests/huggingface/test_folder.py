"""Model folders without PyTorch: names, layouts and bytes both ways, slices, and what is refused."""

import dataclasses
import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tf_dist.config import Config
from tf_dist.data.tokenizer import ByteTokenizer, CharTokenizer
from tf_dist.errors import CheckpointError, UsageError
from tf_dist.huggingface.config_json import config_json
from tf_dist.huggingface.export import export
from tf_dist.huggingface.families import FAMILIES
from tf_dist.huggingface.folder import expected_shape, left_over, open_folder, read_model
from tf_dist.huggingface.options_of_folder import check_vocabulary, options_of_folder
from tf_dist.huggingface.tokenizer_json import tokenizer_json
from tf_dist.models.build import build
from tf_dist.parallel.sharding import ShardSpec

SIZES = {"vocab_size": 257, "seq_len": 12, "layers": 2, "width": 24, "heads": 4, "tokenizer": "byte"}
LLAMA = {"normalization": "rmsnorm", "activation": "swiglu", "position_embedding": "rope", "bias": "none"}
MODELS = {
    "gpt2": {"activation": "gelu-tanh"},
    "gpt2 untied": {"tie_embeddings": False, "ffn_width": 40, "activation": "relu"},
    "llama": {**LLAMA, "kv_heads": 2, "tie_embeddings": False},
    "llama of whole heads": {**LLAMA, "rope_scaling": "llama3:8:1:4:64", "head_width": 8},
    "llama with biases": {**LLAMA, "bias": "all"},
    "mistral": {**LLAMA, "kv_heads": 2, "sliding_window": 5},
    "qwen2": {**LLAMA, "bias": "qkv", "kv_heads": 1},
    "qwen3": {**LLAMA, "qk_norm": True, "head_width": 8, "kv_heads": 2},
}


def config(name):
    return Config(**SIZES, **MODELS[name])


def weights(name):
    model = build(config(name))
    rng = np.random.default_rng(1)
    return {one.path: rng.standard_normal(one.shape).astype(np.float32) for one in model.weights}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / name.replace(" ", "-")
            export(config(name), ByteTokenizer(), weights(name).__getitem__, made[name])
        return made[name]

    return of


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_back_options_and_bytes(name, folders):
    folder, wanted = folders(name), config(name)
    options = options_of_folder(folder, Config(seq_len=12), True)
    assert options["ffn_width"] in (wanted.ffn_width, wanted.width_of_ffn(24))
    same = dataclasses.replace(wanted, ffn_width=options["ffn_width"])
    assert dataclasses.replace(Config(**SIZES), **options) == same
    opened = open_folder(folder, wanted)
    ours = weights(name)
    assert set(opened.ours) == set(ours) and not left_over(opened)
    for path, array in ours.items():
        assert opened.shape(path) == expected_shape(path, wanted, 257) == array.shape
        np.testing.assert_array_equal(opened.read(path), array)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama of whole heads"])
def test_a_shard_is_read_alone(name, folders):
    opened = open_folder(folders(name), config(name))
    for path, array in weights(name).items():
        for axis in range(array.ndim):
            length = array.shape[axis]
            for ranges in [(range(1, length),), (range(0, 2), range(length // 2, length // 2 + 3))]:
                shard = ShardSpec(array.shape, axis, ranges)
                np.testing.assert_array_equal(opened.read(path, shard), shard.take(array))


def test_several_files_and_an_index(tmp_path, folders):
    folder = tmp_path / "sharded"
    export(config("llama"), ByteTokenizer(), weights("llama").__getitem__, folder, shard_bytes=20_000)
    files = sorted(one.name for one in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    opened = open_folder(folder, config("llama"))
    for path, array in weights("llama").items():
        np.testing.assert_array_equal(opened.read(path), array)
    (folder / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"cannot read .*{files[1]}"):
        open_folder(folder, config("llama"))


def test_names_without_a_prefix_and_buffers(tmp_path, folders):
    """As in the folders that OpenAI's GPT-2 was published in."""
    folder = copied(folders("gpt2"), tmp_path)
    tensors = {
        name.removeprefix("transformer."): one
        for name, one in load_file(folder / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = np.ones((1, 1, 12, 12), np.float32)
    save_file(tensors, folder / "model.safetensors")
    opened = open_folder(folder, config("gpt2"))
    assert not left_over(opened)
    np.testing.assert_array_equal(opened.read("final_norm/gamma"), weights("gpt2")["final_norm/gamma"])


def test_shorter_rows_have_fewer_positions(folders):
    short = dataclasses.replace(config("gpt2"), seq_len=7)
    assert options_of_folder(folders("gpt2"), Config(seq_len=7), True)["seq_len"] == 7
    assert options_of_folder(folders("gpt2"), Config(), True)["seq_len"] == 12
    opened = open_folder(folders("gpt2"), short)
    np.testing.assert_array_equal(
        opened.read("positions/positions"), weights("gpt2")["positions/positions"][:7]
    )
    with pytest.raises(UsageError, match=r"seq_len is 13, and .*config.json has 12 positions"):
        options_of_folder(folders("gpt2"), Config(seq_len=13), True)


def test_half_precision_is_read(tmp_path, folders):
    import ml_dtypes

    folder = copied(folders("llama"), tmp_path)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        tensors = {
            n: one.astype(dtype) for n, one in load_file(folders("llama") / "model.safetensors").items()
        }
        save_file(tensors, folder / "model.safetensors")
        found = open_folder(folder, config("llama")).read("final_norm/scale")
        np.testing.assert_array_equal(
            found, weights("llama")["final_norm/scale"].astype(dtype).astype(np.float32)
        )


def copied(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / folder.name)


def rewritten(folder, **fields):
    known = json.loads((folder / "config.json").read_text())
    known.update(fields)
    (folder / "config.json").write_text(json.dumps(known))
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("gpt2", {"model_type": "mamba"}, "model_type is 'mamba'; known are gpt2, llama"),
        ("gpt2", {"model_type": None}, "model_type is None"),
        ("gpt2", {"n_layer": 3}, "have no transformer.h.2.ln_1.weight, which config.json asks for"),
        ("gpt2", {"n_layer": 10**9}, "n_layer is 1000000000, not a number of 1 to 4096"),
        ("gpt2", {"n_embd": 32}, r"transformer.wte.weight \[257, 24\] make .* asks for \[257, 32\]"),
        ("gpt2", {"n_embd": "24"}, "n_embd is '24', not a number"),
        ("gpt2", {"activation_function": "quick_gelu"}, "activation_function is 'quick_gelu'; known"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "models here have False only"),
        ("gpt2", {"vocab_size": 300}, r"\[257, 24\] make embedding/embeddings .* asks for \[300, 24\]"),
        ("llama", {"num_key_value_heads": 4}, r"query_key_value|k_proj"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; known are default"),
        ("llama", {"attention_bias": True}, "here both have biases, or neither"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps is -1, not a number"),
        ("llama", {"intermediate_size": True}, "intermediate_size is True"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "some layers"),
    ],
)  # fmt: skip
def test_another_model_is_refused(name, fields, said, folders, tmp_path):
    folder = rewritten(copied(folders(name), tmp_path), **fields)
    with pytest.raises(CheckpointError, match=said):
        options_of_folder(folder, Config(seq_len=12), True)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "damaged"),
        (b"\xff" * 64, "damaged"),
        (struct.pack("<Q", 1 << 62) + b"{}", "damaged"),
        (struct.pack("<Q", 2) + b"[]", "damaged"),
        (
            struct.pack("<Q", 74)
            + b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000]}}',
            "damaged",
        ),
    ],
)
def test_a_broken_header_is_refused(data, said, folders, tmp_path):
    folder = copied(folders("llama"), tmp_path)
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        options_of_folder(folder, Config(seq_len=12), True)


def test_an_index_leads_nowhere_else(folders, tmp_path):
    folder = copied(folders("llama"), tmp_path)
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no file of weights in this folder"):
        open_folder(folder, config("llama"))


def test_a_flag_that_says_something_else(folders):
    with pytest.raises(UsageError, match=r"width is 48, and 24 in .*config.json: leave it out"):
        options_of_folder(folders("llama"), Config(width=48), True)
    with pytest.raises(UsageError, match=r"has no tokenizer.json: name the tokenizer"):
        options_of_folder(folders("llama"), Config(), False)
    with pytest.raises(CheckpointError, match=r"the tokenizer has 300 tokens, and .* a vocabulary of 257"):
        check_vocabulary(folders("llama"), 300)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "lstm"}, "model lstm: folders of Hugging Face hold Transformers"),
        ({"norm_order": "post"}, "gpt2 would need norm_order pre"),
        ({**LLAMA, "activation": "geglu"}, "llama would need activation swiglu"),
        ({**LLAMA, "qk_norm": True, "bias": "all"}, "other biases"),
        ({"task": "masked-lm"}, "task causal-lm"),
    ],
)
def test_what_no_family_has_is_not_written(options, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        export(Config(**SIZES, **options), ByteTokenizer(), {}.__getitem__, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_over(folders, tmp_path):
    with pytest.raises(UsageError, match="not an empty folder"):
        export(config("gpt2"), ByteTokenizer(), weights("gpt2").__getitem__, folders("gpt2"))
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="not an empty folder"):
        export(config("gpt2"), ByteTokenizer(), weights("gpt2").__getitem__, tmp_path / "link")


def test_every_family_is_read_and_written():
    found = {config_json(config(name), 256)[0] for name in MODELS}
    assert found == set(FAMILIES)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("abc \nü漢")])
def test_tokenizers_have_their_ids_there(tokenizer):
    from tokenizers import Tokenizer

    text = "ab c\nüc漢 ba" if tokenizer.kind == "char" else "a text, ü 漢\n\n  <|endoftext|> x"
    there = Tokenizer.from_str(tokenizer_json(tokenizer))
    there.encode_special_tokens = True
    encoded = there.encode(text, add_special_tokens=False).ids
    assert encoded == tokenizer.encode(text).tolist()
    assert there.decode(encoded) == text
    assert there.token_to_id("<|endoftext|>") == tokenizer.end_of_text


def test_sizes_of_a_folder(folders):
    model = read_model(folders("qwen3"))
    assert (model.family, model.vocab_size, model.positions) == ("llama", 257, 12)
