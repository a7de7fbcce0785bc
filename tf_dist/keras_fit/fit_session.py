"""Per-model state while Keras's `fit` or `evaluate` runs over several ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tf_dist.comm.transport.base import Comm
from tf_dist.keras_fit.gradient_reduction import Reduction
from tf_dist.keras_fit.optimizers_of import comm_of, distributed_of
from tf_dist.keras_fit.step_scope import Law

# Name of the attribute in which a model keeps its session; Keras neither tracks nor saves it.
_ATTRIBUTE = "_tf_dist_session"


@dataclass
class FitSession:
    """A model over ranks.

    Attributes:
        comm: all ranks.
        reduction: over them; that of the model's optimizer, where it has a distributed one.
        law: of the objective; None: not known yet.
        law_is_given: whether it stays when the model is compiled anew (the self-test's).
        begun: whether all ranks have begun this `fit` from the state of rank 0.
        evaluation_is_shared: whether the ranks evaluate a part of the rows each.
        in_fit: whether `fit` runs, and not `train_on_batch`.
        steps: calls of the training function in this `fit`.
        data_may_draw: whether threads that read the data may draw random numbers meanwhile.
    """

    comm: Comm
    reduction: Reduction
    law: Law | None = None
    law_is_given: bool = False
    begun: bool = False
    evaluation_is_shared: bool = False
    in_fit: bool = False
    steps: int = 0
    data_may_draw: bool = False


@dataclass(frozen=True)
class Call:
    """A call of ``fit``, ``evaluate`` or ``predict`` that is under way in this thread.

    Attributes:
        comm: the ranks that share the rows of data that are not of `shard`; None: each has all rows.
        training: whether it is ``fit``.
        epochs: of training.
        session: of the model that is trained.
    """

    comm: Comm | None
    training: bool
    epochs: int = 1
    session: FitSession | None = None


_local = threading.local()


def session_of(model: Any) -> FitSession | None:
    """The session of a model, made with the ranks of its optimizer; None where it is not over ranks."""
    session: FitSession | None = getattr(model, _ATTRIBUTE, None)
    comm = comm_of(model)
    if comm is not None and (session is None or session.comm is not comm):
        return begin_session(model, comm)
    return session


def begin_session(model: Any, comm: Comm) -> FitSession:
    """A new session of a model."""
    optimizers = distributed_of(model)
    reduction = optimizers[0].reduction if optimizers else Reduction(comm)
    session = FitSession(comm, reduction)
    object.__setattr__(model, _ATTRIBUTE, session)  # past Keras, which would track it
    return session


def current_call() -> Call | None:
    """The innermost call under way in this thread."""
    calls: list[Call] = getattr(_local, "calls", [])
    return calls[-1] if calls else None


@contextmanager
def under_way(call: Call) -> Iterator[None]:
    """Mark a call as under way."""
    calls = _local.__dict__.setdefault("calls", [])
    calls.append(call)
    try:
        yield
    finally:
        calls.pop()


@contextmanager
def independent() -> Iterator[None]:
    """Let each rank train and evaluate models of its own: a `fit` inside of it communicates with nobody.

    For a model that one rank alone trains, or one of another kind on each rank, while a Comm is connected.
    The optimizer must not be distributed.
    """
    before, _local.independent = is_independent(), True
    try:
        yield
    finally:
        _local.independent = before


def is_independent() -> bool:
    """Whether this thread is inside of `independent`."""
    return bool(getattr(_local, "independent", False))
