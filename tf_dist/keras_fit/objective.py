"""Are gradients and states of N ranks those of one process? Found by a dry run of the user's own code.

A dry run takes a few rows of each rank through the user's own ``train_step``, without stepping: once on
every rank with the rows of all (what one process would compute), and over the ranks by each `Law`, until
one gives the same gradients. If none does, or if weights that layers change by themselves become others,
training is refused before its first step. Random layers draw fixed numbers meanwhile, weights are moved a
little, for some terms vanish where weights are zero, and all variables are put back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count, zip_longest
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dist.comm.transport.base import Comm, SerialComm
from tf_dist.errors import LaunchError, UsageError, behind
from tf_dist.keras_callbacks.replica_sync import deferred_starts
from tf_dist.keras_fit import rank_randomness, refusals
from tf_dist.keras_fit.dry_run import eagerly, put_back
from tf_dist.keras_fit.fit_consistency import state_of
from tf_dist.keras_fit.fit_session import FitSession
from tf_dist.keras_fit.gradient_law import by_law
from tf_dist.keras_fit.gradient_reduction import Reduction
from tf_dist.keras_fit.names import name_of
from tf_dist.keras_fit.row_exchange import first_rows, rows_again, rows_of_all, rows_reversed
from tf_dist.keras_fit.step_logs import Numbers, kinds_of, numbers_of
from tf_dist.keras_fit.step_scope import Law, StepScope, entered, rows_of
from tf_dist.keras_fit.whose_objective import module_of

LAWS = (
    Law(),
    Law(added="sum"),
    Law(gather_user_losses=True),
    Law(gather_user_losses=True, added="sum"),
    Law(gradients="mean"),
    Law(added="sum", gradients="mean"),
    Law(gather_user_losses=True, gradients="mean"),
    Law(global_losses=False, gradients="mean"),
    Law(global_losses=False, gradients="sum"),
)
ONE_PROCESS = Law(global_losses=False)
# Differences of a gradient from that of one process are in units of the largest number in it. What rounding
# makes of it is measured: one process with its rows in reverse order. A law is that of one process within so
# many times this, or within what is lost by sums in parts: some ten steps of the format.
ROUNDINGS = 100
LOST = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
# However much rounding is measured: laws differ by the ratio of the ranks' rows, a penalty of them by less.
TOLERANCE, TOLERANCE_OF_HALVES = 2e-3, 5e-2
# No other law needs to be tried.
SURE = {"float64": 3e-15, "float32": 3e-7}
# Of laws that differ by rounding alone the first is taken: within so many times the closest.
ALIKE = 10
# Rows of each rank that are tried, at least: with fewer, masks of all ranks may have one length.
FEWEST = 3
# By so much are gradients enlarged to see whether they are clipped.
LARGE = 1e6
# Weights are moved by this part of them.
MOVED_BY = 0.1

Step = Callable[[Any], Any]
Named = list[tuple[str, np.ndarray | None]]


class DryRunResult(NamedTuple):
    """What a step has come to.

    Attributes:
        gradients: that the optimizers were given.
        changes: which the step has made by itself of weights and of optimizers' variables; None: none.
        logs: the numbers that it has returned.
    """

    gradients: Named
    changes: Named
    logs: Numbers


class Trial(NamedTuple):
    """How far a law is from one process.

    Attributes:
        law: that was tried.
        apart: the largest difference of a gradient, on any rank.
        failures: what was said where the step failed.
        other_state: the first variable that the step changes otherwise than in one process; "": none.
        logs: what the step has returned on this rank.
    """

    law: Law
    apart: float
    failures: list[str]
    other_state: str
    logs: Numbers


def decided(model: Any, step: Step, data: Any, session: FitSession) -> Law:
    """The law by which this rank's rows are trained on; a collective.

    Args:
        model: built, with the weights of rank 0.
        step: the user's ``train_step``.
        data: a batch of rows, at least one.
        session: of the model.

    Raises:
        UsageError: on all ranks: by no law the step is that of one process, or it does to what is of this
            rank's rows alone what it must do to what is of all rows (clipping, counts that are weights).
    """
    comm, sure = session.comm, min(SURE.get(kind, 0.0) for kind in _compute_dtypes(model))
    mine = rows_again(data, _rows_to_try(model, comm.size) + (comm.rank == 0))
    everyones = rows_of_all(mine, comm)
    expected, moved = _of_one_process(model, step, everyones, comm)
    trials: list[Trial] = []
    for law in LAWS:
        trials.append(_by(law, model, step, mine, session, expected, moved))
        if trials[-1].apart <= sure:
            break
    # A small term that adds up otherwise (a penalty of 1 %) must not pass for rounding: the closest law.
    closest = min(one.apart for one in trials)
    if closest > sure and closest > _tolerance(
        model, _rounding(model, step, everyones, expected, moved, comm)
    ):
        raise UsageError(
            refusals.of_objective(model, closest, [said for one in trials for said in one.failures])
        )
    taken = next(one for one in trials if one.apart <= ALIKE * max(closest, sure))
    if taken.other_state:
        raise UsageError(refusals.of_state(model, taken.other_state))
    if any(comm.allgather_obj(_is_nonlinear(model, step, everyones, expected, moved))):
        raise UsageError(refusals.of_clipping(model))
    kinds = kinds_of(expected.logs, taken.logs, int(rows_of(mine)), comm)
    return replace(taken.law, logs=tuple(kinds.items()))


def _of_one_process(model: Any, step: Step, everyones: Any, comm: Comm) -> tuple[DryRunResult, bool]:
    """What one process comes to with the rows of all ranks, and whether weights were moved for it."""
    moved = True
    expected, error = _alone(model, step, everyones, moved)
    if not all(comm.allgather_obj(not error and _is_finite(expected.gradients))):  # not with any weights
        moved = False
        expected, error = _alone(model, step, everyones, moved)
    errors = [one for one in comm.allgather_obj(error) if one]
    if errors:
        raise UsageError(
            "model.fit over ranks tries the model's train_step eagerly on a few rows before the first step, "
            f"which failed: {errors[0]}"
        )
    return expected, moved


def _by(
    law: Law, model: Any, step: Step, mine: Any, session: FitSession, expected: DryRunResult, moved: bool
) -> Trial:
    """Try a law; a collective, of which all ranks know the same but for their own logs."""
    found, failure = _over_ranks(model, step, mine, session, law, moved)
    apart = float("inf") if found is None else _difference(expected.gradients, found.gradients)
    everyone = session.comm.allgather_obj([apart, failure, _other_state(model, expected, found)])
    return Trial(
        law,
        max(difference for difference, *_ in everyone),
        [said for _, said, _ in everyone if said],
        next((path for *_, path in everyone if path), ""),
        {} if found is None else found.logs,
    )


def _rows_to_try(model: Any, ranks: int) -> int:
    """Rows of each rank but rank 0, which has one more; all counts are told from the number of outputs.

    Keras takes an eager target of as many rows as a model has outputs for a list of targets.
    """
    losses = [] if model._compile_loss is None else keras.tree.flatten(model._compile_loss._user_loss)
    outputs = {len(losses), len(getattr(model, "outputs", None) or [])} - {0, 1}
    return next(rows for rows in count(FEWEST) if not outputs & {rows, rows + 1, ranks * rows + 1})


def built_by_a_step(model: Any, step: Step, data: Any) -> str:
    """Make the variables of a model that only its own ``train_step`` knows how to call.

    Returns:
        What went wrong, or nothing.
    """
    scope = StepScope(Reduction(SerialComm()), ONE_PROCESS, True, first_rows(data, 2), captured=[])
    try:
        with put_back(model), eagerly(), deferred_starts(), entered(scope):
            step(scope.data)
    except Exception as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _is_nonlinear(model: Any, step: Step, data: Any, expected: DryRunResult, moved: bool) -> bool:
    """Whether a step of the user gives the optimizer what is no linear function of its gradients.

    Clipping, for one, which no few rows may show: gradients are tried a million times as large, and none.
    """
    if module_of(type(model).train_step) == "keras":
        return False
    large, failed = _alone(model, step, data, moved, LARGE)
    none, failed_too = _alone(model, step, data, moved, 0.0)
    if failed or failed_too or not (_is_finite(large.gradients) and _is_finite(none.gradients)):
        return False
    slopes = [
        _slopes(one, none.gradients, scale)
        for one, scale in ((expected.gradients, 1.0), (large.gradients, LARGE))
    ]
    return _difference(*slopes) > _most(model)


def _slopes(gradients: Named, none: Named, scale: float) -> Named:
    return [
        (name, None if one is None or still is None else (_as_float(one) - still) / scale)
        for (name, one), (_, still) in zip(gradients, none, strict=False)
    ]


def _alone(
    model: Any, step: Step, data: Any, moved: bool, gradient_scale: float = 1.0
) -> tuple[DryRunResult, str]:
    scope = StepScope(
        Reduction(SerialComm()), ONE_PROCESS, True, data, captured=[], gradient_scale=gradient_scale
    )
    try:
        return _tried(model, step, scope, moved), ""
    except Exception as error:
        return DryRunResult([], [], {}), _first_line(error)


def _over_ranks(
    model: Any, step: Step, data: Any, session: FitSession, law: Law, moved: bool
) -> tuple[DryRunResult | None, str]:
    """What all ranks come to by a law; None, and what was said, where the step fails by it."""
    scope, failure = StepScope(session.reduction, law, True, data, captured=[]), ""
    try:
        found: DryRunResult | None = _tried(model, step, scope, moved)
    except Exception as error:
        if isinstance(behind(error), LaunchError):
            return None, ""  # another rank has failed, and says so
        found, failure = None, _first_line(error)
    try:
        session.reduction.end()  # on ranks that have failed, and on those that have not
    except LaunchError:
        return None, failure
    return found, failure


def _tried(model: Any, step: Step, scope: StepScope, moved: bool) -> DryRunResult:
    found: Named = []
    with put_back(model), eagerly(), rank_randomness.none(), deferred_starts(), entered(scope):
        if moved:
            _move(model.trainable_variables)
        states = [(one, np.array(one.numpy())) for one in state_of(model)]
        logs = numbers_of(step(scope.data))
        for optimizer, variables, grads in scope.captured or []:
            means = scope.reduction.mean(by_law(grads, scope), [name_of(variable) for variable in variables])
            name = type(optimizer).__name__
            for variable, mean in zip(variables, means, strict=True):
                value = None if mean is None else np.asarray(tf.convert_to_tensor(mean))
                found.append((f"{name} {name_of(variable)}", value))
        changes = [(one.path, _change(before, one.numpy())) for one, before in states]
    return DryRunResult(found, changes, logs)


def _change(before: np.ndarray, after: Any) -> np.ndarray | None:
    """None where there is none, as of most weights: so they are not kept."""
    same = np.array_equal(before, after, equal_nan=before.dtype.kind == "f")
    return None if same else _as_float(after) - _as_float(before)


def _as_float(value: Any) -> np.ndarray:
    return np.asarray(value).astype(np.float64)


def _move(variables: list[Any]) -> None:
    """Move weights by a tenth, alike on all ranks, with their signs; away from zero where all are zero."""
    rng = np.random.default_rng(0)
    for variable in variables:
        value = np.asarray(variable.value)
        if np.issubdtype(value.dtype, np.floating):
            by = rng.uniform(-MOVED_BY, MOVED_BY, value.shape)
            variable.assign((value * (1 + by) if value.any() else by).astype(value.dtype))


def _is_finite(gradients: Named) -> bool:
    return all(one is None or bool(np.isfinite(one).all()) for _, one in gradients)


def _difference(expected: Named, found: Named) -> float:
    if [name for name, _ in found] != [name for name, _ in expected]:
        return float("inf")
    worst, scale = 0.0, 0.0
    for (_, one), (_, other) in zip(expected, found, strict=True):
        if (one is None) != (other is None):
            return float("inf")
        if one is None or other is None or not one.size:
            continue
        scale = max(scale, float(np.abs(one).max()))
        apart = float(np.abs(one.astype(np.float64) - other).max())
        worst = max(worst, apart if np.isfinite(apart) else float("inf"))
    return worst / scale if scale > 0 else (0.0 if worst == 0 else float("inf"))


def _other_state(model: Any, expected: DryRunResult, found: DryRunResult | None) -> str:
    """The first weight, or variable of an optimizer, that the step changes otherwise than in one process."""
    if found is None:
        return ""
    for (path, change), (other, mine) in zip_longest(expected.changes, found.changes, fillvalue=("", None)):
        if path != other:
            return path or other
        if change is None and mine is None:
            continue
        wanted = np.float64(0) if change is None else change
        apart = np.abs((0 if mine is None else mine) - wanted)
        if not float(apart.max()) <= _most(model) * float(np.abs(wanted).max()):
            return path
    return ""


def _rounding(
    model: Any, step: Step, everyones: Any, expected: DryRunResult, moved: bool, comm: Comm
) -> float:
    """The difference that another order of the rows makes in one process; a collective."""
    found, error = _alone(model, step, rows_reversed(everyones), moved)
    apart = float("inf") if error else _difference(expected.gradients, found.gradients)
    return float(max(comm.allgather_obj(apart)))


def _tolerance(model: Any, rounding: float) -> float:
    most, kinds = _most(model), _compute_dtypes(model)
    return min(most, max(ROUNDINGS * rounding, *(LOST.get(kind, most) for kind in kinds)))


def _most(model: Any) -> float:
    return TOLERANCE if _compute_dtypes(model) <= SURE.keys() else TOLERANCE_OF_HALVES


def _compute_dtypes(model: Any) -> set[str]:
    kinds = {layer.compute_dtype for layer in model._flatten_layers() if layer.compute_dtype is not None}
    return kinds or {"float32"}
