"""The models that benchmarks train: characters of tinyshakespeare, from nanoGPT's CPU recipe upwards."""

from __future__ import annotations

from typing import Any, NamedTuple

VOCABULARY = 65
GPT_SMALL: dict[str, Any] = {"model": "transformer", "layers": 4, "width": 128, "heads": 4, "seq_len": 64}
LSTM: dict[str, Any] = {"model": "lstm", "layers": 2, "width": 256, "heads": 4, "seq_len": 64}
GPT: dict[str, Any] = {"model": "transformer", "layers": 6, "width": 384, "heads": 6, "seq_len": 256}
# Two of a size that tests can wait for.
TINY_GPT: dict[str, Any] = {"model": "transformer", "layers": 2, "width": 16, "heads": 2, "seq_len": 8}
TINY_LSTM: dict[str, Any] = {"model": "lstm", "layers": 2, "width": 16, "heads": 2, "seq_len": 8}

# Of the optimizer, Keras's AdamW, in every way to train: `torch_ways` says the same to PyTorch's.
LEARNING_RATE, WEIGHT_DECAY, EPSILON, CLIP_NORM = 1e-4, 0.004, 1e-7, 1.0


class Recipe(NamedTuple):
    """A model, the rows of each rank in a step, and the steps of each way that count in each round."""

    sizes: dict[str, Any]
    rows: int
    steps: int


RECIPES = {
    "gpt-10.7M": Recipe(GPT, 4, 6),
    "gpt-0.81M": Recipe(GPT_SMALL, 12, 30),
    "lstm-1.08M": Recipe(LSTM, 32, 12),
    "tiny-gpt": Recipe(TINY_GPT, 4, 5),
    "tiny-lstm": Recipe(TINY_LSTM, 4, 5),
}
MEASURED = ("gpt-10.7M", "gpt-0.81M", "lstm-1.08M")


def chosen(words: tuple[str, ...] | list[str]) -> list[str]:
    """The recipes that a user names, or the three that are measured.

    Raises:
        SystemExit: there is no such recipe.
    """
    unknown = [word for word in words if word not in RECIPES]
    if unknown:
        raise SystemExit(f"error: no model {', '.join(unknown)}: choose of {', '.join(RECIPES)}")
    return list(words) or list(MEASURED)
