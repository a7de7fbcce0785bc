"""Degrees of parallelism: what they must fit, with values that do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tf_dist.errors import UsageError
from tf_dist.partition import must_divide

if TYPE_CHECKING:
    from tf_dist.config import Config

AXES = ("tensor_parallel", "pipeline_parallel", "sequence_parallel")


def check_degrees(config: Config) -> None:
    """Refuse a grid that the model, or another option, does not fit.

    Raises:
        UsageError: with the arithmetic, and the nearest values that work.
    """
    if config.tensor_parallel > 1:
        _check_tensor(config)
    if config.sequence_parallel > 1:
        _check_sequence(config)
    if config.pipeline_parallel > 1:
        _check_pipeline(config)


def check_horovod(config: Config) -> None:
    """Refuse what Horovod has not: messages between two ranks.

    Raises:
        UsageError: with what would do.
    """
    if config.backend == "horovod" and (shared := in_use(config)):
        wanted = " and ".join(f"{name} {degree}" for name, degree in shared.items())
        raise UsageError(f"backend horovod cannot carry {wanted}: use backend mpi")


def in_use(config: Config) -> dict[str, int]:
    """The degrees of parallelism above 1, by name."""
    return {name: getattr(config, name) for name in AXES if getattr(config, name) > 1}


def _check_tensor(config: Config) -> None:
    """A user's model knows best what can be divided: its layers refuse what cannot."""
    if config.model == "transformer":
        must_divide(config.tensor_parallel, "heads", config.heads, "tensor_parallel")
    elif config.model == "lstm":
        must_divide(config.tensor_parallel, "width", config.width, "tensor_parallel")


def _check_sequence(config: Config) -> None:
    degree = config.sequence_parallel
    if config.model != "transformer":
        lstm = config.model == "lstm"
        why = "each step of an LSTM needs the one before" if lstm else "it has its own layers"
        raise UsageError(
            f"sequence_parallel is {degree}, but the tokens of a row cannot be shared with model "
            f"{config.model}: {why}. Use sequence_parallel 1, or model transformer"
        )
    must_divide(degree, "seq_len", config.seq_len, "sequence_parallel")
    if config.pipeline_parallel > 1:
        raise UsageError(
            f"sequence_parallel {degree} with pipeline_parallel {config.pipeline_parallel}: stages whose "
            "rows are shared do not exist yet. Use one of the two, with tensor_parallel or more data ranks"
        )
    if config.dropout:
        raise UsageError(
            f"sequence_parallel {degree} with dropout {config.dropout:g}: ranks that share a row would draw "
            "other masks than one rank does. Use dropout 0 or sequence_parallel 1"
        )


def _check_pipeline(config: Config) -> None:
    ranks, layers = config.pipeline_parallel, config.layers
    interleaved = config.pipeline_schedule == "interleaved"
    each = config.virtual_stages if interleaved else 1
    _check_cuts(config.pipeline_cuts, ranks * each)
    if ":" in config.model or ranks * each <= layers:  # of a user's model only the graph tells
        return
    stages = f"pipeline_parallel {ranks}"
    if interleaved:
        stages += f" x virtual_stages {each} = {ranks * each} stages"
    fits = f"pipeline_parallel at most {layers // each}" if layers >= each else "another pipeline_schedule"
    raise UsageError(
        f"{stages} is more than layers {layers}: each stage needs one. Use {fits}, or layers {ranks * each} "
        "or more"
    )


def _check_cuts(text: str, stages: int) -> None:
    """Whether there are as many numbers as cuts; which of them can be had, the model's graph tells."""
    cuts = [word.strip() for word in text.split(",")] if text else []
    if cuts and not (all(map(str.isdecimal, cuts)) and len(cuts) == stages - 1):
        raise UsageError(
            f"pipeline_cuts {text!r}: {stages - 1} layers with which a stage begins are needed for {stages} "
            f"stages, as in {','.join(map(str, range(1, stages)))}"
        )
