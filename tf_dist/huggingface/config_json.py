"""``config.json`` <-> our options of a model, for the families that both sides can build.

What a family cannot say is refused, with both sides named: a model that computes something else than its
folder says would be silent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tf_dist.config import Config
from tf_dist.config.rope_scaling import RopeScaling
from tf_dist.config.transformer import (
    ALL_BIASES,
    LAYERNORM,
    LEARNED,
    NO_BIASES,
    PRE,
    QKV_BIASES,
    RMSNORM,
    ROPE,
)
from tf_dist.errors import CheckpointError, UsageError
from tf_dist.untrusted_files import shown

MOST_LAYERS, MOST_SIZE = 1 << 12, 1 << 24
# Activations by their names there.
GELUS = {"gelu": "gelu", "gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh", "relu": "relu"}
THEIR_GELU = {"gelu": "gelu", "gelu-tanh": "gelu_new", "relu": "relu"}
# Model types with Llama's weights, and the biases of queries, keys and values that each always has.
LLAMAS = {"llama": NO_BIASES, "mistral": NO_BIASES, "qwen2": QKV_BIASES, "qwen3": NO_BIASES}
CLASSES = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip


@dataclass(frozen=True)
class ModelOfFolder:
    """What a folder's ``config.json`` says.

    family: of `families.FAMILIES`. options: ours, by name. positions: rows that the table of positions has
    or rope was trained on. vocab_size: rows of the embedding.
    """

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    positions: int = 0
    vocab_size: int = 0


def model_of(config: Mapping[str, Any], path: str) -> ModelOfFolder:
    """Our options for a ``config.json``.

    Args:
        config: its fields.
        path: of the file, for messages.

    Raises:
        CheckpointError: a family or feature that this program does not have, or a size that cannot be.
    """
    kind = config.get("model_type")
    reader = _Reader(config, path)
    if kind == "gpt2":
        return _of_gpt2(reader)
    if kind in LLAMAS:
        return _of_llama(reader, str(kind))
    raise CheckpointError(
        f"{path}: model_type is {shown(kind)}; known are gpt2, {', '.join(LLAMAS)}. Code of a folder is "
        "never run"
    )


@dataclass(frozen=True)
class _Reader:
    """Reads fields of a foreign ``config.json``."""

    config: Mapping[str, Any]
    path: str

    def size(self, name: str, default: int | None = None, most: int = MOST_SIZE) -> int:
        value = self.config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise CheckpointError(f"{self.path}: {name} is {shown(value)}, not a number of 1 to {most}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise CheckpointError(f"{self.path}: {name} is {shown(value)}, not a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name, default)
        return default if value is None else bool(value)

    def among(self, name: str, known: Mapping[str, str], default: str) -> str:
        value = self.config.get(name, default)
        if value not in known:
            raise CheckpointError(f"{self.path}: {name} is {shown(value)}; known are {', '.join(known)}")
        return known[str(value)]

    def must_be(self, name: str, wanted: Any, default: Any) -> None:
        value = self.config.get(name, default)
        if value != wanted:
            raise CheckpointError(
                f"{self.path}: {name} is {shown(value)}, and models here have {shown(wanted)} only"
            )


def _of_gpt2(read: _Reader) -> ModelOfFolder:
    width = read.size("n_embd", 768)
    for name, wanted in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        read.must_be(name, wanted, wanted)
    read.must_be("add_cross_attention", False, False)
    ffn = read.config.get("n_inner")
    options = {
        "model": "transformer", "layers": read.size("n_layer", 12, MOST_LAYERS), "width": width,
        "heads": read.size("n_head", 12), "normalization": LAYERNORM, "norm_order": PRE,
        "norm_epsilon": read.number("layer_norm_epsilon", 1e-5),
        "activation": read.among("activation_function", GELUS, "gelu_new"),
        "ffn_width": 0 if ffn in (None, 4 * width) else read.size("n_inner"),
        "position_embedding": LEARNED, "bias": ALL_BIASES,
        "tie_embeddings": read.flag("tie_word_embeddings", True),
    }  # fmt: skip
    return ModelOfFolder("gpt2", options, read.size("n_positions", 1024), read.size("vocab_size", 50257))


def _of_llama(read: _Reader, kind: str) -> ModelOfFolder:
    width, heads = read.size("hidden_size"), read.size("num_attention_heads")
    read.among("hidden_act", {"silu": "swiglu"}, "silu")
    head_width = read.size("head_dim", width // heads)
    theta, scaling = _rope(read)
    options = {
        "model": "transformer", "layers": read.size("num_hidden_layers", None, MOST_LAYERS), "width": width,
        "heads": heads, "normalization": RMSNORM, "norm_order": PRE,
        "norm_epsilon": read.number("rms_norm_eps", 1e-6), "activation": "swiglu",
        "ffn_width": read.size("intermediate_size"), "position_embedding": ROPE, "rope_theta": theta,
        "rope_scaling": scaling, "bias": _biases(read, kind), "qk_norm": kind == "qwen3",
        "kv_heads": _fewer(read.size("num_key_value_heads", heads), heads),
        "head_width": 0 if head_width * heads == width else head_width, "sliding_window": _window(read, kind),
        "tie_embeddings": read.flag("tie_word_embeddings", False),
    }  # fmt: skip
    return ModelOfFolder(
        "llama", options, read.size("max_position_embeddings", 2048), read.size("vocab_size")
    )


def _fewer(kv_heads: int, heads: int) -> int:
    return 0 if kv_heads == heads else kv_heads


def _biases(read: _Reader, kind: str) -> str:
    attention, feed_forward = read.flag("attention_bias", False), read.flag("mlp_bias", False)
    if attention != feed_forward:
        raise CheckpointError(
            f"{read.path}: attention_bias is {attention} and mlp_bias {feed_forward}: here both have biases, "
            "or neither"
        )
    return ALL_BIASES if attention else LLAMAS[kind]


def _window(read: _Reader, kind: str) -> int:
    """W; the Qwen models have a switch besides, and say from which layer on."""
    window = read.config.get("sliding_window")
    if window is None or (kind.startswith("qwen") and not read.flag("use_sliding_window", False)):
        return 0
    kinds = read.config.get("layer_types")
    if (isinstance(kinds, list) and len({str(one) for one in kinds}) > 1) or read.config.get(
        "max_window_layers"
    ):
        raise CheckpointError(f"{read.path}: some layers have a sliding window and some have none")
    return read.size("sliding_window")


def _rope(read: _Reader) -> tuple[float, str]:
    """Base and scaling of rope; newer files have one field for both."""
    found = read.config.get("rope_parameters") or read.config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{read.path}: rope_parameters is {shown(found)}, not an object")
    inner = _Reader({"rope_theta": read.config.get("rope_theta", 10_000.0), **found}, read.path)
    theta = inner.number("rope_theta", 10_000.0)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return theta, ""
    if kind == "linear":
        return theta, str(RopeScaling("linear", inner.number("factor", 0)))
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return theta, str(RopeScaling("llama3", *(inner.number(name, 0) for name in names)))
    raise CheckpointError(f"{read.path}: rope_type is {shown(kind)}; known are default, linear and llama3")


# From ours ----------------------------------------------------------------------------------------


def config_json(config: Config, end_of_text: int) -> tuple[str, dict[str, Any]]:
    """The family of a model of ours, and its ``config.json``.

    Args:
        config: of its run, with the vocabulary.
        end_of_text: id of the token that ends a text.

    Raises:
        UsageError: no family has such a model.
    """
    kind = _model_type(config)
    common = {
        "architectures": [CLASSES[kind]], "model_type": kind, "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings, "bos_token_id": end_of_text,
        "eos_token_id": end_of_text, "torch_dtype": "float32", "dtype": "float32",
    }  # fmt: skip
    if kind == "gpt2":
        return "gpt2", {**common, **_as_gpt2(config)}
    return "llama", {**common, **_as_llama(config, kind)}


def _model_type(config: Config) -> str:
    """The model type whose models compute what this one does.

    Raises:
        UsageError: there is none, with what each would need.
    """
    if config.model != "transformer":
        raise UsageError(
            f"model {config.model}: folders of Hugging Face hold Transformers. Convert it to a file "
            "that ends in .safetensors or .keras instead"
        )
    gpt2 = {
        "task": "causal-lm", "normalization": LAYERNORM, "norm_order": PRE, "position_embedding": LEARNED,
        "bias": ALL_BIASES, "kv_heads": 0, "head_width": 0, "qk_norm": False, "sliding_window": 0,
        "documents": "windows",
    }  # fmt: skip
    llama = {
        "task": "causal-lm", "normalization": RMSNORM, "norm_order": PRE, "position_embedding": ROPE,
        "activation": "swiglu", "documents": "windows",
    }  # fmt: skip
    lacks = {
        name: [f"{key} {value}" for key, value in wanted.items() if getattr(config, key) != value]
        for name, wanted in (("gpt2", gpt2), ("llama", llama))
    }
    if config.activation in ("swiglu", "geglu"):
        lacks["gpt2"].append("activation gelu")
    if not lacks["gpt2"]:
        return "gpt2"
    if not lacks["llama"] and (found := _which_llama(config)):
        return found
    closest = min(lacks, key=lambda name: len(lacks[name]))
    raise UsageError(
        f"no family of Hugging Face has this model; {closest} would need "
        f"{', '.join(lacks[closest]) or 'other biases, norms of heads or windows'}"
    )


def _which_llama(config: Config) -> str:
    if config.qk_norm:
        return "qwen3" if config.bias == NO_BIASES else ""
    if config.bias == QKV_BIASES:
        return "qwen2" if not config.head_width else ""
    if config.sliding_window:
        return "mistral" if config.bias == NO_BIASES else ""
    return "llama"


def _as_gpt2(config: Config) -> dict[str, Any]:
    return {
        "n_embd": config.width, "n_layer": config.layers, "n_head": config.heads,
        "n_positions": config.seq_len, "n_inner": config.ffn_width or None,
        "activation_function": THEIR_GELU[config.activation], "layer_norm_epsilon": config.norm_epsilon,
        "attn_pdrop": config.dropout, "embd_pdrop": config.dropout, "resid_pdrop": config.dropout,
    }  # fmt: skip


def _as_llama(config: Config, kind: str) -> dict[str, Any]:
    windowed = bool(config.sliding_window)
    biased = config.bias == ALL_BIASES
    made = {
        "hidden_size": config.width, "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.width_of_head(config.width, config.heads),
        "intermediate_size": config.width_of_ffn(config.width), "hidden_act": "silu",
        "max_position_embeddings": config.seq_len, "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta, "rope_parameters": _rope_parameters(config),
        "attention_bias": biased, "mlp_bias": biased, "attention_dropout": config.dropout,
    }  # fmt: skip
    if kind.startswith("qwen"):
        made.update(use_sliding_window=windowed, max_window_layers=0)
    if windowed or kind == "mistral":
        made["sliding_window"] = config.sliding_window or None
    return made


def _rope_parameters(config: Config) -> dict[str, Any]:
    scaling = RopeScaling.parsed(config.rope_scaling)
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    made: dict[str, Any] = {
        "rope_type": scaling.rule,
        "rope_theta": config.rope_theta,
        "factor": scaling.factor,
    }
    if scaling.rule == "llama3":
        made.update(
            low_freq_factor=scaling.low, high_freq_factor=scaling.high,
            original_max_position_embeddings=int(scaling.tokens),
        )  # fmt: skip
    return made
