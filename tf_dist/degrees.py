"""Degrees of parallelism: what they must fit, with values that do, and which share each rank has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tf_dist.errors import UsageError

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
    _check_zero(config)
    if config.backend == "horovod":
        _check_horovod(config)


def in_use(config: Config) -> list[str]:
    """The degrees of parallelism above 1, as in ``tensor_parallel 2``."""
    return [f"{name} {getattr(config, name)}" for name in AXES if getattr(config, name) > 1]


def must_divide(degree: int, what: str, number: int, option: str) -> None:
    """Refuse a degree of parallelism that does not divide a model, and say what would.

    Args:
        degree: of parallelism.
        what: is divided, for instance "heads".
        number: how many of them there are.
        option: sets the degree.

    Raises:
        UsageError: with the arithmetic, and the nearest values that work.
    """
    if number % degree == 0:
        return
    fits = [n for n in range(1, number + 1) if number % n == 0]
    near = sorted(sorted(fits, key=lambda n: (abs(n - degree), n))[:2])
    raise UsageError(
        f"{option} {degree} does not divide {what} {number} ({number} = {number // degree} x {degree} + "
        f"{number % degree}). Nearest that do: {' and '.join(map(str, near))}; or let {what} be "
        f"{(number // degree + 1) * degree}"
    )


def share(n_items: int, rank: int, size: int) -> range:
    """The block of ``range(n_items)`` that is this rank's: contiguous, and balanced to within one.

    Earlier ranks take the ones too many; with fewer items than ranks the last ranks get none.

    Raises:
        UsageError: a negative number of items, or ``rank`` is not in ``range(size)``.
    """
    if n_items < 0 or not 0 <= rank < size:
        raise UsageError(f"no share of {n_items} items for rank {rank} of {size}.")
    each, more = divmod(n_items, size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


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


def _check_zero(config: Config) -> None:
    stage = config.zero_stage
    if stage > 3:
        raise UsageError(f"zero_stage is {stage}: there are stages 1, 2 and 3")
    shared = in_use(config)
    if config.update == "zero" and stage > 1 and shared:
        raise UsageError(
            f"zero_stage {stage} with {' and '.join(shared)}: gradients and weights are divided among data "
            "ranks alone. Use zero_stage 1, which divides the optimizer's state, or degrees of 1"
        )


def _check_horovod(config: Config) -> None:
    """Horovod has neither messages between two ranks nor sums of which a rank gets a part."""
    wanted = in_use(config)
    wanted += ["update zero"] if config.update == "zero" else []
    if wanted:
        raise UsageError(f"backend horovod cannot carry {' and '.join(wanted)}: use backend mpi")
