"""Exception classes, and the exit code that each ends the job with.

The codes follow BSD's sysexits where one fits. ``docs/exit-codes.md`` lists them for users; scripts and
job systems may rely on them. An error's text says what happened, why, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class TfDistError(Exception):
    """A failure we foresaw. ``exit_code`` is the status the whole job ends with."""

    exit_code = 70


class OrderError(TfDistError, RuntimeError):
    """The ranks do not call the same collectives in the same order, or one of them does not come."""

    exit_code = 70


class RankLost(TfDistError, RuntimeError):
    """A rank has died, and MPI goes on without it (``mpirun --with-ft ulfm``).

    Args:
        what: happened; what helps is added.
        ranks: as below.

    Attributes:
        ranks: those known to have died, as they were numbered when the job began; may be empty where another
            rank has noticed.
    """

    exit_code = 70

    def __init__(self, what: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(f"{what}. The same command goes on from the newest checkpoint")
        self.ranks = list(ranks)


class TooFewLeft(RankLost):
    """So many ranks have died that the run is to end."""


class UsageError(TfDistError, ValueError):
    """A flag, configuration key or argument that cannot be right."""

    exit_code = 64


class DataError(TfDistError, ValueError):
    """Text or tokens that are missing, unreadable or too few."""

    exit_code = 65


class BackendMissing(TfDistError, ImportError):
    """The chosen backend is not installed, or was built for something else."""

    exit_code = 69


class OutOfMemory(TfDistError, MemoryError):
    """A rank could not allocate memory."""

    exit_code = 71


class SavedAndStopped(TfDistError):
    """The job was asked to stop, saved a checkpoint and can be started again."""

    exit_code = 75


class NumericError(TfDistError, ArithmeticError):
    """NaN or infinity where training cannot go on."""

    exit_code = 76


class CheckpointError(TfDistError):
    """No checkpoint that can be used, or one that does not fit this run."""

    exit_code = 77


class LaunchError(TfDistError, RuntimeError):
    """The job was started in a way that cannot work, or its ranks do not agree."""

    exit_code = 78


def of_memory(error: BaseException) -> BaseException:
    """`OutOfMemory` for what Python, NumPy or TensorFlow raise where memory is refused; others as they are.

    C++ that meets the limit where it does not expect it ends the process (std::bad_alloc): nobody can say
    more.
    """
    refused = isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"
    if not refused or isinstance(error, OutOfMemory):
        return error
    first = next(iter(str(error).strip().splitlines()), "")
    return OutOfMemory(f"a rank is out of memory{': ' + first[:200] if first else ''}. {ways_out()}")


def ways_out() -> str:
    """What helps where memory is too small."""
    return (
        "More ranks can share the model: --strategy zero --zero-stage 3 (weights, gradients and optimizer "
        "state), --pipeline-parallel or --tensor-parallel; a smaller --micro-batch-size makes activations "
        "smaller"
    )


_hidden: list[TfDistError] = []
# A few may be under way, of threads that run graphs; older ones would keep alive what they hold.
MOST_HIDDEN = 8


def hide(error: TfDistError) -> TfDistError:
    """Remember an error that is raised in a running graph: TensorFlow's own knows nothing but its text."""
    _hidden.append(error)
    del _hidden[:-MOST_HIDDEN]
    return error


def called_by_a_graph(function: Callable[P, T]) -> Callable[P, T]:
    """A function for `tf.numpy_function`, whose errors `behind` finds again."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except TfDistError as error:
            hide(error)
            raise

    return call


def behind(error: BaseException) -> BaseException:
    """The error of ours that one of TensorFlow quotes; any other error is returned itself.

    It was hidden, or raised while a function was traced: then it is among what was being handled.
    """
    if not type(error).__module__.startswith("tensorflow."):
        return error
    candidates, handled = list(_hidden), error.__context__
    while handled is not None:
        candidates += [handled] if isinstance(handled, TfDistError) else []
        handled = handled.__context__
    return next((ours for ours in reversed(candidates) if _words(ours) in _words(error)), error)


def _words(error: BaseException) -> str:
    """An error's text on one line: TensorFlow indents what it quotes."""
    return " ".join(str(error).split())
