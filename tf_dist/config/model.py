"""Options of the model: which one, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options
from tf_dist.errors import UsageError
from tf_dist.spelling import did_you_mean

MODELS = ("transformer", "lstm")
option = partial(options.option, group="model")


@dataclass(frozen=True)
class ModelOptions(options.Options):
    """The model. Sizes in layers, units and tokens."""

    model: str = option(
        "transformer",
        text="transformer, lstm, or package.module:function, called with the configuration, returning a "
        "keras.Model",
        on_resume="same",
        names_code=True,
    )
    layers: int = option(4, text="number of layers", least=1, on_resume="same")
    width: int = option(
        128, text="width of the residual stream, or units of each LSTM layer", least=1, on_resume="same"
    )
    heads: int = option(4, text="attention heads; must divide the width", least=1, on_resume="same")
    seq_len: int = option(64, text="tokens in a sequence", least=1, on_resume="same")
    dropout: float = option(0.0, text="dropout rate of activations in training", least=0)
    tie_embeddings: bool = option(True, text="tie the output layer to the embedding matrix", on_resume="same")
    pointer_generator: bool = option(
        False,
        text="of tasks from text to text: let the decoder also copy tokens of its source",
        on_resume="same",
    )
    precision: str = option(
        "float32",
        text="compute precision of the model; weights, optimizer, loss and reductions stay float32",
        choices=("float32", "bfloat16"),
    )

    def check(self) -> None:
        """Refuse sizes that do not fit, and a model that nobody knows."""
        if self.dropout >= 1:
            raise UsageError(f"dropout is {self.dropout}, which drops everything; use a value below 1")
        if ":" not in self.model and self.model not in MODELS:
            raise UsageError(
                f"unknown model {self.model!r}: transformer, lstm or package.module:function"
                + did_you_mean(self.model, MODELS)
            )
