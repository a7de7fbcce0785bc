"""What a ``train_step`` of the user returns for the logs: of each rank's rows, made that of the rows of all.

A number may be a mean over rows, a sum of them, or the same on all ranks: a dry run tells which
(`objective`). Results of metrics are replaced at the end of an epoch, when Keras asks the metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.transport.base import Comm
from tf_dist.keras_fit.step_scope import StepScope

LOG = logging.getLogger(__name__)
MEAN, SUM, ALIKE = "mean", "sum", "alike"
# As far as rounding may take a number that is one of these.
TOLERANCE = 1e-3

Numbers = dict[str, float]


def numbers_of(logs: Any) -> Numbers:
    """The scalars of what a step has returned, eagerly."""
    if not isinstance(logs, dict):
        return {}
    values = {name: np.asarray(value) for name, value in logs.items() if not isinstance(value, dict)}
    return {name: float(one) for name, one in values.items() if one.ndim == 0 and one.dtype.kind in "fiu"}


def kinds_of(expected: Numbers, found: Numbers, rows: int, comm: Comm) -> dict[str, str]:
    """What each number of the logs is, where it is no mean over rows; a collective.

    Args:
        expected: in one process with all rows.
        found: on this rank.
        rows: of this rank.
        comm: all ranks.
    """
    everyone: Sequence[tuple[int, Numbers]] = comm.allgather_obj([rows, found])
    total, kinds, other = sum(count for count, _ in everyone), {}, []
    for name, value in expected.items():
        if not all(name in theirs for _, theirs in everyone):
            continue
        values = [theirs[name] for _, theirs in everyone]
        mean = sum(count * one for (count, _), one in zip(everyone, values, strict=True)) / total
        if len(set(values)) == 1 and _near(values[0], value):
            kinds[name] = ALIKE
        elif not _near(mean, value):
            kinds[name] = SUM if _near(sum(values), value) else MEAN
            other += [name] if kinds[name] == MEAN else []
    if other:
        once(LOG, comm).warning(
            f"logs of the train_step: {', '.join(other)} is neither a mean nor a sum over rows; what is "
            "shown is the mean of the ranks. A keras.metrics metric is of all rows"
        )
    return {name: kind for name, kind in kinds.items() if kind != MEAN}


def of_all_rows(logs: Any, scope: StepScope) -> Any:
    """What a step of the user returns, computed of this rank's rows, as it is of the rows of all ranks."""
    if not isinstance(logs, dict) or scope.law.gradients == "sum":
        return logs
    kinds = dict(scope.law.logs)
    names = [name for name, value in logs.items() if _is_to_reduce(value, kinds.get(name, MEAN))]
    share, any_rows = scope.share()
    for first in range(0, len(names), 4):
        some = names[first : first + 4]
        parts = [_part(logs[name], kinds.get(name, MEAN), share, any_rows) for name in some]
        sums = scope.reduction.sums(parts, "the logs of a step")
        logs = {**logs, **{n: tf.cast(one, _dtype(logs[n])) for n, one in zip(some, sums, strict=True)}}
    return logs


def _part(value: Any, kind: str, share: Any, any_rows: Any) -> Any:
    part = tf.cast(value, tf.float32)
    return tf.where(any_rows, part if kind == SUM else part * tf.cast(share, tf.float32), 0.0)


def _is_to_reduce(value: Any, kind: str) -> bool:
    if not tf.is_tensor(value) or len(value.shape) or kind == ALIKE:
        return False
    return bool(value.dtype.is_floating or (value.dtype.is_integer and kind == SUM))


def _dtype(value: Any) -> Any:
    return value.dtype if value.dtype.is_integer else tf.float32


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * max(abs(other), 1e-6)
