"""Families of models, and the names and layouts of their weights in a folder of Hugging Face.

Each of our weights is one or several of theirs beside each other: a `Composite`. Its last axis is the
concatenation of its parts, some of which are transposed: PyTorch's linear layers have (outputs, inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tf_dist.config import Config


class Part(NamedTuple):
    """A weight of theirs. name: of it. transposed: it has (outputs, inputs)."""

    name: str
    transposed: bool = False


class Composite(NamedTuple):
    """A weight of ours. path: of it. parts: of theirs, beside each other along the last axis."""

    path: str
    parts: tuple[Part, ...]


Names = Callable[[Config], Iterator[Composite]]


@dataclass(frozen=True)
class Family:
    """Models with one layout of weights.

    Args:
        names: the weights of a model of ours, in the order of a checkpoint.
        prefix: of their names, which some published folders leave out.
        ignored: endings of names that are no weights: buffers, and copies of tied ones.
    """

    names: Names
    prefix: str
    ignored: tuple[str, ...] = ()


def _plain(path: str, name: str) -> Composite:
    return Composite(path, (Part(name),))


def _linear(path: str, *names: str, bias: bool) -> Iterator[Composite]:
    """A dense layer of ours that is one or several of theirs."""
    yield Composite(f"{path}/kernel", tuple(Part(f"{name}.weight", True) for name in names))
    if bias:
        yield Composite(f"{path}/bias", tuple(Part(f"{name}.bias") for name in names))


def _norm(path: str, name: str) -> Iterator[Composite]:
    yield _plain(f"{path}/gamma", f"{name}.weight")
    yield _plain(f"{path}/beta", f"{name}.bias")


def _head(config: Config) -> Iterator[Composite]:
    if not config.tie_embeddings:
        yield Composite("embedding/reverse_embeddings", (Part("lm_head.weight", True),))


def gpt2(config: Config) -> Iterator[Composite]:
    """GPT-2: matrices as ours, queries, keys and values in one."""
    yield _plain("embedding/embeddings", "transformer.wte.weight")
    yield from _head(config)
    yield _plain("positions/positions", "transformer.wpe.weight")
    for i in range(config.layers):
        ours, theirs = f"layer_{i}", f"transformer.h.{i}"
        yield from _norm(f"{ours}_attention_norm", f"{theirs}.ln_1")
        for path, name in (
            (f"{ours}_attention/query_key_value", f"{theirs}.attn.c_attn"),
            (f"{ours}_attention/output_projection", f"{theirs}.attn.c_proj"),
        ):
            yield from _convolution(path, name)
        yield from _norm(f"{ours}_feed_forward_norm", f"{theirs}.ln_2")
        yield from _convolution(f"{ours}_feed_forward_in", f"{theirs}.mlp.c_fc")
        yield from _convolution(f"{ours}_feed_forward_out", f"{theirs}.mlp.c_proj")
    yield from _norm("final_norm", "transformer.ln_f")


def _convolution(path: str, name: str) -> Iterator[Composite]:
    """GPT-2's `Conv1D`: a dense layer with (inputs, outputs)."""
    yield _plain(f"{path}/kernel", f"{name}.weight")
    yield _plain(f"{path}/bias", f"{name}.bias")


def llama(config: Config) -> Iterator[Composite]:
    """Llama, Mistral, Qwen 2 and Qwen 3: a matrix for each of queries, keys and values."""
    yield _plain("embedding/embeddings", "model.embed_tokens.weight")
    yield from _head(config)
    all_biases = config.has_bias()
    for i in range(config.layers):
        ours, theirs = f"layer_{i}", f"model.layers.{i}"
        yield _plain(f"{ours}_attention_norm/scale", f"{theirs}.input_layernorm.weight")
        yield from _heads(config, f"{ours}_attention", f"{theirs}.self_attn")
        yield from _linear(
            f"{ours}_attention/output_projection", f"{theirs}.self_attn.o_proj", bias=all_biases
        )
        if config.qk_norm:
            yield _plain(f"{ours}_attention/query_norm/scale", f"{theirs}.self_attn.q_norm.weight")
            yield _plain(f"{ours}_attention/key_norm/scale", f"{theirs}.self_attn.k_norm.weight")
        yield _plain(f"{ours}_feed_forward_norm/scale", f"{theirs}.post_attention_layernorm.weight")
        for which, name in (("gate", "gate_proj"), ("in", "up_proj"), ("out", "down_proj")):
            yield from _linear(f"{ours}_feed_forward_{which}", f"{theirs}.mlp.{name}", bias=all_biases)
    yield _plain("final_norm/scale", "model.norm.weight")


def _heads(config: Config, ours: str, theirs: str) -> Iterator[Composite]:
    bias = config.has_bias(of_queries=True)
    query, key, value = (f"{theirs}.{letter}_proj" for letter in "qkv")
    if config.kv_heads in (0, config.heads):
        yield from _linear(f"{ours}/query_key_value", query, key, value, bias=bias)
        return
    yield from _linear(f"{ours}/query", query, bias=bias)
    yield from _linear(f"{ours}/key_value", key, value, bias=bias)


FAMILIES = {
    "gpt2": Family(gpt2, "transformer.", (".attn.bias", ".attn.masked_bias", "lm_head.weight")),
    "llama": Family(llama, "", ("rotary_emb.inv_freq", "lm_head.weight")),
}
