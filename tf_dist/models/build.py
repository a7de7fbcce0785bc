"""From a `Config` to a Keras model: ours by name, or the user's by ``package.module:function``."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator

import keras

from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.models.outline import outline


def build(config: Config) -> keras.Model:
    """The model that ``config.model`` names, with initial weights drawn from ``config.seed``.

    It computes in ``config.precision``; its weights are float32 (Micikevicius et al. 2018).
    ``config.vocab_size`` must be the tokenizer's.

    Raises:
        UsageError: the user's function cannot be found or does not return a fitting `keras.Model`.
    """
    keras.utils.set_random_seed(config.seed)
    function = _users_function(config.model) if ":" in config.model else _own
    # Where ranks have shards of the weights, nobody makes all of them.
    sharded = config.update == "zero" and config.zero_stage == 3
    with _computing_in(config.precision), outline() if sharded else contextlib.nullcontext():
        model = function(config)
        if function is not _own:
            check(model, config.model, config.vocab_size, config.seq_len)
    return model


@contextlib.contextmanager
def _computing_in(precision: str) -> Iterator[None]:
    """Let the layers that are made here compute in ``precision``, with weights in float32.

    Keras has one policy for the whole process. It is put back: layers keep theirs, and what a user's code
    makes elsewhere is not ours to change. float32 is Keras's default, so for it nothing is set.
    """
    before = keras.config.dtype_policy()
    try:
        if precision != "float32":
            keras.config.set_dtype_policy(f"mixed_{precision}")
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _own(config: Config) -> keras.Model:
    sizes = (config.vocab_size, config.seq_len, config.layers, config.width)
    if config.model == "lstm":
        from tf_dist.models import lstm

        return lstm.build(*sizes, config.dropout, config.tie_embeddings)
    from tf_dist.models import transformer

    return transformer.build(*sizes, config.heads, config.dropout, config.tie_embeddings)


def check(model: object, name: str, vocab_size: int, seq_len: int) -> None:
    """Raise UsageError unless ``model`` maps (B, T) int32 to (B, T, V)."""
    if not isinstance(model, keras.Model):
        raise UsageError(f"{name} returned a {type(model).__name__}, not a keras.Model")
    tokens_BxT = keras.ops.zeros((1, seq_len), dtype="int32")
    try:
        shape = tuple(model(tokens_BxT).shape)  # also builds a subclassed model
    except Exception as error:
        raise UsageError(f"{name} does not take token ids of shape (B, {seq_len}): {error}") from error
    if shape != (1, seq_len, vocab_size):
        raise UsageError(
            f"{name} maps token ids of shape (1, {seq_len}) to {shape}, not to logits of shape "
            f"(1, {seq_len}, {vocab_size})"
        )


def _users_function(name: str):  # type: ignore[no-untyped-def]
    module_name, _, function_name = name.partition(":")
    # `python scripts/train.py` puts scripts/ on the path, not the folder the user stands in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UsageError(f"--model {name}: {error}. It is looked for from the current folder") from error
    if not callable(function):
        raise UsageError(f"--model {name} is a {type(function).__name__}, not a function")
    return function
