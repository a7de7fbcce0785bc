"""Degrees of parallelism: how many ranks share a model, and what they must fit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from math import prod

from tf_dist import options
from tf_dist.config.model import ModelOptions
from tf_dist.config.pipeline import PipelineOptions
from tf_dist.config.transformer import TransformerOptions
from tf_dist.errors import UsageError
from tf_dist.parallel.mesh import AXES
from tf_dist.partition import must_divide

option = partial(options.option, group="parallelism", least=1, on_resume="free")


@dataclass(frozen=True)
class ParallelismOptions(options.Options):
    """Ranks along the axes of a `tf_dist.Mesh`, but for data, which takes the rest."""

    tensor_parallel: int = option(
        1, text="tensor parallelism: ranks that shard every layer (heads, units, vocabulary)"
    )
    pipeline_parallel: int = option(
        1, text="pipeline parallelism: ranks that split the layers into consecutive stages"
    )
    sequence_parallel: int = option(
        1, text="context parallelism: ranks that split the tokens of a sequence (transformer)"
    )

    @property
    def degrees(self) -> tuple[int, ...]:
        """How many ranks share layers, the tokens of a row, and each layer: the order of a `tf_dist.Mesh`."""
        return tuple(getattr(self, f"{axis}_parallel") for axis in AXES[1:])

    @property
    def ranks_of_a_model(self) -> int:
        """How many ranks hold the weights once."""
        return prod(self.degrees)

    @property
    def above_1(self) -> dict[str, int]:
        """The degrees of parallelism above 1, by name."""
        degrees = {field.name: getattr(self, field.name) for field in fields(ParallelismOptions)}
        return {name: degree for name, degree in degrees.items() if degree > 1}

    def check_grid(self, model: ModelOptions, kind: TransformerOptions, pipeline: PipelineOptions) -> None:
        """Refuse a grid that the model, or its pipeline, does not fit.

        Raises:
            UsageError: with the arithmetic, and the nearest values that work.
        """
        if self.tensor_parallel > 1:
            self._check_tensor(model, kind)
        if self.sequence_parallel > 1:
            self._check_sequence(model)
        if self.pipeline_parallel > 1:
            pipeline.check_stages(self.pipeline_parallel, model.layers, ":" not in model.model)

    def check_backend(self, backend: str) -> None:
        """Refuse what Horovod has not: messages between two ranks.

        Raises:
            UsageError: with what would do.
        """
        if backend == "horovod" and self.above_1:
            wanted = " and ".join(f"{name} {degree}" for name, degree in self.above_1.items())
            raise UsageError(f"backend horovod cannot carry {wanted}: use backend mpi")

    def _check_tensor(self, model: ModelOptions, kind: TransformerOptions) -> None:
        """A user's model knows best what can be divided: its layers refuse what cannot."""
        if model.model == "transformer":
            must_divide(self.tensor_parallel, "heads", model.heads, "tensor_parallel")
            if kind.kv_heads:
                must_divide(self.tensor_parallel, "kv_heads", kind.kv_heads, "tensor_parallel")
            width = kind.width_of_ffn(model.width)
            must_divide(self.tensor_parallel, "ffn_width", width, "tensor_parallel")
        elif model.model == "lstm":
            must_divide(self.tensor_parallel, "width", model.width, "tensor_parallel")

    def _check_sequence(self, model: ModelOptions) -> None:
        degree = self.sequence_parallel
        if model.model != "transformer":
            lstm = model.model == "lstm"
            why = "each step of an LSTM needs the one before" if lstm else "it has its own layers"
            raise UsageError(
                f"sequence_parallel is {degree}, but the tokens of a row cannot be shared with model "
                f"{model.model}: {why}. Use sequence_parallel 1, or model transformer"
            )
        must_divide(degree, "seq_len", model.seq_len, "sequence_parallel")
        if self.pipeline_parallel > 1:
            raise UsageError(
                f"sequence_parallel {degree} with pipeline_parallel {self.pipeline_parallel}: stages whose "
                "rows are shared do not exist yet. Use one of the two, with tensor_parallel or more data "
                "ranks"
            )
        if model.dropout:
            raise UsageError(
                f"sequence_parallel {degree} with dropout {model.dropout:g}: ranks that share a row would "
                "draw other masks than one rank does. Use dropout 0 or sequence_parallel 1"
            )
