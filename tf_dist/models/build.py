"""Build a Keras model from a `Config`: ours by name, or the user's by ``package.module:function``."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tf_dist.config import Config
from tf_dist.config.data import PACKED
from tf_dist.config.fine_tuning import FineTuningOptions
from tf_dist.config.transformer import TransformerOptions
from tf_dist.errors import UsageError
from tf_dist.models import lstm, transformer
from tf_dist.models.fine_tuning import fine_tuned
from tf_dist.models.meta_init import is_deferred
from tf_dist.models.transformer import PLAIN, Layers
from tf_dist.users_code import imported


def build(config: Config, layers: Layers = PLAIN) -> keras.Model:
    """Build the model that ``config.model`` names, with initial weights drawn from ``config.seed``.

    It computes in ``config.precision``; its weights are float32 (Micikevicius et al. 2018).
    ``config.vocab_size`` must be the tokenizer's. Weights are frozen, and adapters added, as it says.

    Args:
        config: of the run.
        layers: layer types, where ranks partition the model. A user's function that takes two arguments
            gets them as the second one.

    Raises:
        UsageError: the user's function cannot be found or does not return a suitable `keras.Model`.
    """
    if ":" in config.model:
        return users_model(config, layers, config.seq_len, (config.seq_len, config.vocab_size))
    with reproducible(config):
        return fine_tuned(_own(config, layers), config.part(FineTuningOptions), config.seed)


def users_model(config: Config, layers: Layers, words: int, outputs: tuple[int, int]) -> keras.Model:
    """The model that a user's function returns for a run.

    Args:
        config: of the run.
        layers: layer types, where ranks partition the model.
        words: W, of a row: the model takes (B, W) int32.
        outputs: what it returns of a row, as (T, V).

    Raises:
        UsageError: as `build`.
    """
    function = _users_function(config.model)
    with reproducible(config):
        model = function(config, layers) if _takes_layers(function) else function(config)
        check(model, config.model, words, outputs)
        if config.tensor_parallel > 1 and layers is not PLAIN:  # PLAIN when a run is loaded unpartitioned
            _check_divided(model, config)
        return fine_tuned(model, config.part(FineTuningOptions), config.seed)


@contextlib.contextmanager
def reproducible(config: Config) -> Iterator[None]:
    """Draw initial weights of models built here from the run's seed; let them compute in its precision."""
    keras.utils.set_random_seed(config.seed)
    with _computing_in(config.precision):
        yield


def _takes_layers(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    return True


def _check_divided(model: keras.Model, config: Config) -> None:
    """Refuse a model that should be partitioned and is not."""
    if not any(hasattr(variable, "tf_dist_part") for variable in model.weights):
        raise UsageError(
            f"tensor_parallel is {config.tensor_parallel}, but no weight of {config.model} is divided: let "
            "the function take a second argument, and make layers with it (column_dense, row_dense, "
            "attention, lstm, embedding), or use --tensor-parallel 1"
        )


@contextlib.contextmanager
def _computing_in(precision: str) -> Iterator[None]:
    """Set the compute precision of layers created here to ``precision``, with weights in float32.

    Keras has one policy per process. It is restored afterwards: layers keep theirs, and layers that user code
    creates elsewhere must not change. float32 is Keras's default, so for it nothing is set.
    """
    before = keras.config.dtype_policy()
    try:
        if precision != "float32":
            keras.config.set_dtype_policy(f"mixed_{precision}")
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _own(config: Config, layers: Layers) -> keras.Model:
    sizes = (config.vocab_size, config.seq_len, config.layers, config.width)
    if config.model == "lstm":
        return lstm.build(*sizes, config.dropout, config.tie_embeddings, layers.lstm, layers.embedding)
    end = packed_end(config)
    kind = config.part(TransformerOptions)
    return transformer.build(*sizes, config.heads, config.dropout, config.tie_embeddings, layers, end, kind)


def packed_end(config: Config) -> int | None:
    """The id that ends a document, for models that keep packed documents apart; None: windows.

    Such a model writes nothing after that token: it has not learnt to.

    Raises:
        UsageError: it is not known.
    """
    if config.documents != PACKED:
        return None
    if config.end_of_text < 0:
        raise UsageError(
            "documents packed: end_of_text must be the id of the token that ends a document, to build a model"
        )
    return config.end_of_text


def check(model: object, name: str, seq_len: int, outputs: tuple[int, int]) -> None:
    """Raise UsageError unless ``model`` maps (B, T) int32 to (B, *outputs)."""
    if not isinstance(model, keras.Model):
        raise UsageError(f"{name} returned a {type(model).__name__}, not a keras.Model")
    if any(map(is_deferred, model.variables)):
        tokens_BxT = keras.KerasTensor((1, seq_len), dtype="int32")
    else:
        tokens_BxT = keras.ops.zeros((1, seq_len), dtype="int32")
    try:
        shape = tuple(model(tokens_BxT).shape)  # also builds a subclassed model
    except Exception as error:
        raise UsageError(f"{name} does not take token ids of shape (B, {seq_len}): {error}") from error
    if shape != (1, *outputs):
        raise UsageError(
            f"{name} maps token ids of shape (1, {seq_len}) to {shape}, not to logits of shape "
            f"{(1, *outputs)}"
        )


def _users_function(name: str) -> Callable[..., Any]:
    function = imported(name, "--model")
    if not callable(function):
        raise UsageError(f"--model {name} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]
