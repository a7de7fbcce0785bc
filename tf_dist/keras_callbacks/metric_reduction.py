"""Reduce Keras metrics over all ranks: sum their states, then compute the result once.

A Keras metric keeps sums: `Mean` a total and a count, `AUC` and `Precision` counts of cases, `MeanIoU` a
confusion matrix. The sum of the ranks' states is the state of one process that saw all the data, so the
result is exact: weighted by samples, or by the metric's own weights, and never a mean of means.

Sample weights are part of a loss. That includes those that `shard` adds if ranks do not divide the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import LaunchError

# Name of the attribute of a metric that each rank has updated with the rows of all: its result is global.
OF_ALL_ROWS = "_tf_dist_of_all_rows"


@dataclass(frozen=True)
class MetricResults:
    """Results of metrics over all ranks.

    Attributes:
        exact: results of summed states, by name: numbers, or arrays (a score for each class).
        samples: that Keras's loss metric has counted on this rank; 0 without one.
    """

    exact: dict[str, Any]
    samples: float

    def applied_to(self, logs: Mapping[str, Any], comm: Comm) -> dict[str, Any]:
        """Return these logs with global values, the same on every rank; a collective.

        A value that belongs to no metric (from a custom ``train_step``) becomes the mean of the ranks'
        values, weighted by their samples.
        """
        mine = {name: np.asarray(value, np.float64).tolist() for name, value in logs.items()}
        everyone = comm.allgather_obj([self.samples, mine])
        merged = {
            name: self.exact[name] if name in self.exact else _weighted_mean(name, everyone)
            for name in everyone[0][1]
        }
        # Equal by construction, independent of the arithmetic of different nodes: callbacks decide by it.
        agreed = comm.broadcast_obj({name: np.asarray(value).tolist() for name, value in merged.items()})
        return {name: _as_keras_has_it(value) for name, value in agreed.items()}


def over_ranks(model: keras.Model, comm: Comm) -> MetricResults:
    """The results of a model's metrics over all ranks; a collective. Local states are unchanged.

    Raises:
        LaunchError: on every rank: the ranks have different metrics.
    """
    summed, others = _metrics(model)
    variables = [variable for metric in summed for variable in metric.variables]
    mine = [np.asarray(variable.value).copy() for variable in variables]
    state = np.concatenate([np.zeros(1), *(array.astype(np.float64).ravel() for array in mine)])
    kinds = comm.allgather_obj([[type(metric).__name__, metric.name] for metric in summed] + [state.size])
    if any(theirs != kinds[0] for theirs in kinds):
        raise LaunchError(f"the ranks have different metrics: {kinds}. Compile all models alike")
    comm.allreduce(state)
    try:
        _assign(variables, mine, state[1:])
        results = _flat(model.get_metrics_result())
        for metric in summed:  # also those that only a train_step names
            for name, value in _flat({metric.name: metric.result()}).items():
                results.setdefault(name, value)
    finally:
        for variable, array in zip(variables, mine, strict=True):
            variable.assign(array)
    unknown = {name for metric in others for name in _names(metric)}
    exact = {name: np.asarray(value) for name, value in results.items() if name not in unknown}
    return MetricResults(exact, samples_seen(model))


def _flat(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results by name, those in a dictionary by their own."""
    flat: dict[str, Any] = {}
    for name, value in results.items():
        flat.update(_flat(value) if isinstance(value, Mapping) else {name: value})
    return flat


def _as_keras_has_it(value: Any) -> Any:
    return np.asarray(value, np.float32) if isinstance(value, list) else float(value)


def samples_seen(model: keras.Model) -> float:
    """Samples that Keras's loss metric has counted on this rank since its reset; 0 without one."""
    tracker = getattr(model, "_loss_tracker", None)
    return float(tracker.count) if tracker is not None else 0.0


def _metrics(model: keras.Model) -> tuple[list[Any], list[Any]]:
    """Metrics whose states may be summed, and the others."""
    flat: list[Any] = []
    for metric in model.metrics:
        flat.extend(getattr(metric, "metrics", [metric]))  # compile()'s metrics are one of several
    summed = [metric for metric in flat if _can_be_summed(metric)]
    return summed, [metric for metric in flat if not _can_be_summed(metric)]


def _can_be_summed(metric: Any) -> bool:
    """Whether it says so (`sums_over_ranks`), or derives from one of Keras's own metrics: all of them sum."""
    if getattr(metric, OF_ALL_ROWS, False):
        return False
    says = getattr(metric, "sums_over_ranks", None)
    if says is not None:
        return bool(says)
    bases = [kind for kind in type(metric).__mro__ if kind is not keras.metrics.Metric]
    return any(kind.__module__.startswith("keras.src.metrics.") for kind in bases)


def _assign(variables: list[Any], mine: list[np.ndarray], state: np.ndarray) -> None:
    ends = np.cumsum([array.size for array in mine])
    for variable, array, part in zip(variables, mine, np.split(state, ends), strict=False):
        variable.assign(part.reshape(array.shape).astype(array.dtype))


def _names(metric: Any) -> set[str]:
    result = metric.result()
    return set(result) if isinstance(result, dict) else {metric.name}


def _weighted_mean(name: str, everyone: list[Any]) -> Any:
    there = [(weight, logs[name]) for weight, logs in everyone if name in logs]
    values = np.array([value for _, value in there], np.float64)
    weights = np.array([weight for weight, _ in there])
    if (values == values[0]).all():  # already global: keep the last bit
        return there[0][1]
    fine = np.isfinite(values.reshape(len(values), -1)).all(axis=1)  # a mean over no rows is NaN
    if fine.any():
        values, weights = values[fine], weights[fine]
    return np.average(values, axis=0, weights=weights if weights.sum() > 0 else None)
