"""Consistency check of `fit`: one model on all ranks, compared before, during and after training.

Before the first step: names, order and shapes of the weights, and all that decides what a step does with
them (optimizer, loss, metrics, layers, dtype policies). While it trains: every weight and every number of the
optimizer, bit for bit, after steps 1, 2, 4 ... 64, after every 100 from then on, and when `fit` ends.
"""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np

from tf_dist.comm.runtime.consensus import agree
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import LaunchError
from tf_dist.keras_callbacks.replica_sync import first_difference
from tf_dist.keras_fit.names import unnumbered
from tf_dist.keras_fit.optimizers_of import optimizers_of

EVERY_STEPS = 100
# Digits to which hyper-parameters are compared: files keep some of them in float32.
DIGITS = 6
# Keys of configurations in which ranks may differ: Keras numbers names, and draws seeds where none is given.
MEANINGLESS = ("name", "registered_name", "seed")


def is_due(step: int) -> bool:
    """Whether the state is compared after a step, counted from 1."""
    return step % EVERY_STEPS == 0 or (step < EVERY_STEPS and step & (step - 1) == 0)


def state_of(model: Any) -> list[Any]:
    """All weights of a model and all variables of its optimizers, each once, in one order."""
    variables = list(model.weights)
    for optimizer in optimizers_of(model):
        variables += list(optimizer.variables)
    return list({id(variable): variable for variable in variables}.values())


def check_state(model: Any, comm: Comm, when: str) -> None:
    """Compare the state of all ranks, bit for bit; a collective.

    Raises:
        LaunchError: on every rank: who differs, and in which variable first.
    """
    local = _accumulators(model)
    variables = [variable for variable in state_of(model) if id(variable) not in local]
    difference = first_difference(variables, comm)
    if difference:
        raise LaunchError(
            f"{when} of model.fit {difference}: they have stopped training one model. "
            "Does a callback or train_step change weights on some ranks only? Are all nodes of one kind?"
        )


def _accumulators(model: Any) -> set[int]:
    """Gradients that optimizers add up before the ranks reduce them: of each rank's own rows."""
    found: set[int] = set()
    for optimizer in optimizers_of(model):
        while optimizer is not None:
            found |= {id(one) for one in getattr(optimizer, "_accumulated_gradients", [])}
            optimizer = getattr(optimizer, "inner_optimizer", None)
    return found


def check_layout(model: Any, comm: Comm) -> None:
    """Compare names, order, shapes and kinds of the variables; a collective.

    Raises:
        LaunchError: on every rank: the first that differs.
    """
    weights = [
        [v.path, f"{tuple(v.shape)} {v.dtype}{'' if v.trainable else ' not trainable'}"]
        for v in model.weights
    ]
    optimizers = [[f"{tuple(v.shape)} {v.dtype}" for v in one.variables] for one in optimizers_of(model)]
    everyone = comm.allgather_obj([weights, optimizers])
    for rank, (theirs, _) in enumerate(everyone):
        problem = _weights_differ(everyone[0][0], theirs)
        if problem:
            raise LaunchError(f"rank 0 and rank {rank} have different models: {problem}")
    for rank, (_, theirs) in enumerate(everyone):
        if theirs != everyone[0][1]:
            counts = [[len(one) for one in ours] for ours in (everyone[0][1], theirs)]
            raise LaunchError(
                f"rank 0 and rank {rank} have optimizers with different variables ({counts[0]} and "
                f"{counts[1]}): make them alike on all ranks"
            )


def _kind(variable: Any) -> str:
    return f"{tuple(variable.shape)} {variable.dtype}"


def _weights_differ(ours: list[Any], theirs: list[Any]) -> str:
    if len(ours) != len(theirs):
        return f"{len(ours)} and {len(theirs)} weights"
    names, others = [one[0] for one in ours], [one[0] for one in theirs]
    same_names = sorted(names) == sorted(others)
    for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        alike = mine[1] == other[1] and unnumbered(mine[0]) == unnumbered(other[0])
        if mine != other and (same_names or not alike):
            order = (
                ". The same names stand in another order: a Python set, which has another one in each "
                "process, may have made the layers"
                if same_names
                else ""
            )
            return f"weight {place} is {mine[0]} {mine[1]} on one, {other[0]} {other[1]} on the other{order}"
    return ""


def check_meaning(model: Any, comm: Comm, more: dict[str, Any]) -> None:
    """Compare what decides about a step; a collective.

    Args:
        model: compiled.
        comm: all ranks.
        more: facts of this `fit`, such as its number of epochs.

    Raises:
        LaunchError: on every rank: what differs, and on which ranks.
    """
    agree(comm, {**facts_of(model), **more}, "model.fit")


def facts_of(model: Any) -> dict[str, Any]:
    """JSON values by name: what a step of this model does, as far as configurations say."""
    facts: dict[str, Any] = {"run_eagerly": bool(model.run_eagerly)}
    facts["steps_per_execution"] = int(np.asarray(getattr(model, "steps_per_execution", 1)))
    for number, optimizer in enumerate(optimizers_of(model)):
        label = "optimizer" if number == 0 else f"optimizer {number}"
        facts[label] = type(optimizer).__name__
        for name, value in _config(optimizer).items():
            facts[f"{label} {name}"] = _plain(value)
    compiled = getattr(model, "_compile_loss", None)
    if compiled is not None:
        facts["loss"] = _plain(_described(compiled._user_loss))
        facts["loss_weights"] = _plain(compiled._user_loss_weights)
    compiled = getattr(model, "_compile_metrics", None)
    if compiled is not None:
        facts["metrics"] = _plain(_described([compiled._user_metrics, compiled._user_weighted_metrics]))
    for number, layer in enumerate(model._flatten_layers()):
        facts[f"layer {number}"] = _layer(layer)
    return facts


def _layer(layer: Any) -> str:
    config = {} if isinstance(layer, keras.Model) else _config(layer)
    config = {name: value for name, value in config.items() if name not in ("build_config", "batch_shape")}
    said = _plain({**config, "dtype": str(layer.dtype_policy.name), "trainable": layer.trainable})
    return f"{type(layer).__name__} {json.dumps(said, sort_keys=True)}"


def _config(thing: Any) -> dict[str, Any]:
    try:
        config = dict(thing.get_config())
    except Exception:  # a class of the user that has none
        return {}
    config.pop("name", None)
    return config


def _described(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _described(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_described(one) for one in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if hasattr(value, "get_config"):
        return [type(value).__name__, _config(value)]
    return getattr(value, "__qualname__", type(value).__name__)


def _plain(value: Any) -> Any:
    """As JSON, without names that Keras numbers, without addresses, floats as far as files keep them."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k not in MEANINGLESS}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.{DIGITS}g}")
    if isinstance(value, np.ndarray):
        return [
            list(value.shape),
            _plain(float(np.sum(value, dtype=np.float64))) if value.dtype.kind in "fiu" else "",
        ]
    return getattr(value, "__qualname__", type(value).__name__)
