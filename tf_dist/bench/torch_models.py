"""The models of `tf_dist.models` in PyTorch: the same parameters and numbers, written idiomatically.

Run by the Python of .venv-torch, which has no TensorFlow; the rest of the project never imports this.

Legend: B rows, T tokens, V vocabulary, D width, H units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tf_dist.bench import models


class TorchAttention(nn.Module):
    """Causal self-attention, with PyTorch's own fused kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output_projection = nn.Linear(width, width)

    def forward(self, x_BxTxD: Any) -> Any:
        """(B, T, D) -> (B, T, D)."""
        B, T, D = x_BxTxD.shape
        parts = self.query_key_value(x_BxTxD).split(D, dim=2)
        q, k, v = (part.view(B, T, self.heads, D // self.heads).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output_projection(attended.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """One layer: attention, then a feed-forward network four times as wide, each on a normed input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-5)
        self.attention = TorchAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width, eps=1e-5)
        self.feed_forward_in = nn.Linear(width, 4 * width)
        self.feed_forward_out = nn.Linear(4 * width, width)

    def forward(self, x_BxTxD: Any) -> Any:
        """(B, T, D) -> (B, T, D)."""
        x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD))
        h = functional.gelu(self.feed_forward_in(self.feed_forward_norm(x_BxTxD)))
        return x_BxTxD + self.feed_forward_out(h)


class Transformer(nn.Module):
    """`tf_dist.models.transformer` with tied embeddings and without dropout."""

    def __init__(self, vocab_size: int, seq_len: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(seq_len, width))
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width, eps=1e-5)
        for name, parameter in self.named_parameters():  # GPT-2's
            if name.endswith(("output_projection.weight", "feed_forward_out.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens_BxT: Any) -> Any:
        """Token ids (B, T) -> logits (B, T, V)."""
        x_BxTxD = self.embedding(tokens_BxT) + self.positions
        for layer in self.layers:
            x_BxTxD = layer(x_BxTxD)
        return functional.linear(self.final_norm(x_BxTxD), self.embedding.weight)


class TorchLSTM(nn.Module):
    """`tf_dist.models.lstm` with tied embeddings and without dropout.

    PyTorch's LSTM has two bias vectors where Keras's has one: 4 H L parameters more, with the same gradients.
    """

    def __init__(self, vocab_size: int, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)

    def forward(self, tokens_BxT: Any) -> Any:
        """Token ids (B, T) -> logits (B, T, V)."""
        return functional.linear(self.lstm(self.embedding(tokens_BxT))[0], self.embedding.weight)


def build(sizes: Mapping[str, Any], vocab_size: int = models.VOCABULARY) -> nn.Module:
    """The model that `tf_dist.models.build` makes of the same sizes; weights from PyTorch's generator."""
    if sizes["model"] == "lstm":
        return TorchLSTM(vocab_size, sizes["layers"], sizes["width"])
    shape = (sizes["seq_len"], sizes["layers"], sizes["width"], sizes["heads"])
    return Transformer(vocab_size, *shape)


def load(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Give a model the weights of ours, NumPy arrays by Keras's path of each variable.

    Raises:
        KeyError: a weight is missing.
        ValueError: there are weights that the model has no place for, or of another shape.
    """
    left = dict(weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("lstm.bias_hh"):  # Keras has one bias
                parameter.zero_()
                continue
            path = keras_path(name)
            array = torch.from_numpy(left.pop(path))
            array = array.T if array.ndim == 2 and path.endswith("kernel") else array
            if array.shape != parameter.shape:
                raise ValueError(f"{path} is of shape {array.shape}, {name} of {parameter.shape}")
            parameter.copy_(array)
    if left:
        raise ValueError(f"no place for {', '.join(left)}")


def keras_path(name: str) -> str:
    """Keras's path of the variable that a parameter is; ``layers.0.attention_norm.weight`` and the like."""
    if name == "positions":
        return "positions/positions"
    if name == "embedding.weight":
        return "embedding/embeddings"
    if name.startswith("lstm."):
        kind, _, layer = name.removeprefix("lstm.").rpartition("_l")
        words = {"weight_ih": "kernel", "weight_hh": "recurrent_kernel", "bias_ih": "bias"}
        return f"layer_{layer}/lstm_cell/{words[kind]}"
    *place, last = name.removeprefix("layers.").split(".")
    norm = place[-1].endswith("norm")
    word = {"weight": "gamma" if norm else "kernel", "bias": "beta" if norm else "bias"}[last]
    if place[0].isdecimal():
        place = [f"layer_{place[0]}_{place[1]}", *place[2:]]
    return "/".join([*place, word])


def loss_of(model: nn.Module, x_BxT: Any, y_BxT: Any) -> Any:
    """Mean cross-entropy in nats."""
    logits = model(x_BxT)
    return functional.cross_entropy(logits.view(-1, logits.shape[-1]), y_BxT.reshape(-1))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as Keras's defaults have it, in PyTorch's fused version."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=models.LEARNING_RATE,
        weight_decay=models.WEIGHT_DECAY,
        eps=models.EPSILON,
        fused=True,
    )
