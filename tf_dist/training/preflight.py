"""Checks before the first step of a `Trainer`, so that all ranks train the same model.

All ranks compare options, model, optimizer and data (`model_facts`). Then rank 0's weights, trainable or not,
are broadcast, before the optimizer creates its state. Code that behaves differently on one rank, which no
comparison of options can detect, shows in numbers: every rank computes the gradient of the same rows.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import keras
import numpy as np

from tf_dist.comm.formatting import named
from tf_dist.comm.runtime.consensus import agree_on_many
from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.transport.base import Comm
from tf_dist.data.rows import Rows
from tf_dist.errors import LaunchError, UsageError
from tf_dist.keras_callbacks.replica_sync import is_distributed
from tf_dist.models.lm_head import head_of
from tf_dist.models.meta_init import is_deferred
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.sharding import part_of
from tf_dist.runners.moving_statistics import WAYS_OUT, refuse_moving
from tf_dist.runners.replica import FlatParameters, Replica
from tf_dist.runners.runner import MicroBatch, ModelRunner
from tf_dist.strategies.base import Strategy
from tf_dist.training import model_facts
from tf_dist.zero.stage3 import GatheredReplica

LOG = logging.getLogger(__name__)
BUILD_ALIKE = (
    "Build the same model in the same order on every rank: a Python set, for one, has another order in each "
    "process (use a list, or sorted())"
)
GIVE_ALIKE = "Give every rank the same arguments: nothing in them may depend on the rank"
SAME_DATA = "Give every rank all of the data, in one order: a Trainer shares it out itself"
# Largest difference of the same gradient between two kinds of processors, relative to its norm: rounding is
# far below, another activation or loss far above.
TOLERANCE, TOLERANCE_OF_SHORT_FLOATS = 1e-2, 1e-1
# A variable's gradient below this share of the global norm is rounding, and not compared.
OF_THE_WHOLE = 1e-4
# Names of a compiled loss that equals the Trainer's.
KNOWN_LOSSES = ("sparse_categorical_crossentropy", "SparseCategoricalCrossentropy")


def refuse_distributed(optimizer: keras.optimizers.Optimizer) -> None:
    """Refuse an optimizer that reduces gradients itself.

    Raises:
        UsageError: it was passed to `tf_dist.distribute`.
    """
    if is_distributed(optimizer):
        raise UsageError(
            "this optimizer is distributed: in a Trainer gradients would be reduced twice. Give it the Keras "
            "optimizer itself; tf_dist.distribute is for model.fit and loops of your own"
        )


def agree_on_options(comm: Comm, options: Mapping[str, Any]) -> None:
    """Compare a Trainer's options; a collective.

    Raises:
        LaunchError: on every rank, naming what differs.
    """
    agree_on_many(comm, model_facts.of_options(options), "the options of the Trainer", GIVE_ALIKE)


def agree_on_model(model: keras.Model, optimizer: keras.optimizers.Optimizer, mesh: Mesh) -> None:
    """Compare weights, layers and the optimizer, before anything is built from them; a collective.

    Raises:
        LaunchError: on every rank, naming the first weights, layers or parameters that differ.
    """
    agree_on_weights(model, mesh)
    agree_on_many(mesh.replicas, model_facts.of_layers(model), "the model", BUILD_ALIKE)
    agree_on_many(mesh.all, model_facts.of_optimizer(optimizer), "the optimizer", GIVE_ALIKE)


def agree_on_weights(model: keras.Model, mesh: Mesh) -> None:
    """Compare paths, shapes and order of a built model's weights; a collective.

    Raises:
        LaunchError: on every rank, naming the first ones that differ.
    """
    agree_on_many(mesh.all, model_facts.of_weights(model), "the weights of the model", BUILD_ALIKE)


def agree_on_data(comm: Comm, sequences: Rows, held_out: Rows | None, options: Mapping[str, Any]) -> None:
    """Compare the arguments of `fit`; a collective.

    Raises:
        LaunchError: on every rank, naming what differs.
    """
    agree_on_many(comm, model_facts.of_options(options), "the arguments of fit", GIVE_ALIKE)
    data = {"tokens": model_facts.of_array(sequences.tokens)}
    if held_out is not None:
        data["validation"] = model_facts.of_array(held_out.tokens)
    agree_on_many(comm, data, "the data", SAME_DATA)


# Values ---------------------------------------------------------------------------------------------


def broadcast_initial_weights(model: keras.Model, mesh: Mesh) -> None:
    """Broadcast weights, trainable or not, from rank 0; a collective.

    With sharded layers, each shard is broadcast among the ranks that hold it.
    """
    whole = [v for v in model.weights if not is_deferred(v)]
    if mesh.tensor.size == 1:
        give(whole, mesh.all)
        return
    give(whole, mesh.replicas)
    give([v for v in whole if part_of(v).ranges is None], mesh.tensor)


def give(variables: Iterable[Any], comm: Comm) -> None:
    """Broadcast variables of any dtype from the first rank of a Comm; a collective."""
    if comm.size == 1:
        return
    for variable in variables:
        array = np.array(np.asarray(variable.value))
        comm.broadcast(array.reshape(-1).view(np.uint8))
        if comm.rank:
            variable.assign(array)


def find_moving_statistics(
    model: keras.Model, replica: FlatParameters, strategy: Strategy, mesh: Mesh
) -> None:
    """Find weights that layers update themselves, such as the averages of BatchNormalization.

    Raises:
        UsageError: ranks could not keep them equal, with a way out.
    """
    alike = strategy.traits.replicas_equal and mesh.plain
    if not isinstance(replica, Replica) or isinstance(replica, GatheredReplica):
        refuse_moving(model, "ranks share the model")
        return
    replica.find_moving_statistics()
    if replica.moving and not alike:
        found = replica.moving.variables[0].path
        raise UsageError(
            f"training changes {found} by itself: each rank would keep its own averages with strategy "
            f"{strategy} on {mesh}. {WAYS_OUT}"
        )


# Numbers --------------------------------------------------------------------------------------------


def compare_gradients(replica: FlatParameters, mesh: Mesh, step: int, batch: MicroBatch) -> None:
    """Compare the gradients of all ranks for the same rows and weights; a collective.

    With a sharded model each rank computes a different part, and nothing is compared.

    Args:
        replica: this rank's.
        mesh: all ranks.
        step: the next one, for dropout.
        batch: the same on all ranks.

    Raises:
        LaunchError: on every rank, naming the variable and the ranks: the gradients differ.
    """
    comm = mesh.all
    if comm.size == 1 or not mesh.plain or isinstance(replica, GatheredReplica):
        return
    assert isinstance(replica, Replica)
    if replica.foreign_draws():  # of which the Trainer warns
        return
    gradient, sums = replica.gradients(batch.x_BxT, batch.y_BxT, (step, 0))
    starts = replica.layout.starts
    norms = [float(np.linalg.norm(gradient[a:b])) for a, b in pairwise(starts)]
    everyone = comm.allgather_obj([float(sums[0]), *norms], what="the comparison of gradients")
    names = ["the loss", *(f"the gradient of {v.path}" for v in replica.variables)]
    _compare(np.array(everyone, np.float64), comm.broadcast_obj(names), replica.model)


def _compare(norms_RxN: np.ndarray, names: list[str], model: keras.Model) -> None:
    if not np.isfinite(norms_RxN).all():
        return  # the first step will report it
    short = any(layer.compute_dtype != "float32" for layer in model._flatten_layers())
    least, most = norms_RxN.min(axis=0), norms_RxN.max(axis=0)
    small = OF_THE_WHOLE * np.linalg.norm(norms_RxN[:, 1:], axis=1).max()
    differ = most - least > (TOLERANCE_OF_SHORT_FLOATS if short else TOLERANCE) * most + small
    if not differ.any():
        return
    place = int(np.argmax(differ))
    values = norms_RxN[:, place]
    ranks_of: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_of.setdefault(f"{value:.6g}", []).append(rank)
    found = ", ".join(f"{value} on {named(ranks)}" for value, ranks in ranks_of.items())
    raise LaunchError(
        f"from the same weights and the same rows the ranks compute something else: {names[place]} is {found}"
        f" (and {int(differ.sum()) - 1} more differ). {BUILD_ALIKE}. Or does the code of a layer ask for the "
        "rank, or draw numbers by NumPy or Python?"
    )


def refuse_probabilities(
    model: keras.Model, replica: FlatParameters, runner: ModelRunner, mesh: Mesh, sequences: Rows
) -> None:
    """Refuse a model that ends in softmax, as a Trainer needs logits; a collective.

    Raises:
        UsageError: on every rank, with a way out.
    """
    if head_of(model) is not None:  # a built-in model, which ends in a product with the embedding table
        return
    last = (getattr(model, "layers", None) or [None])[-1]
    if not _has_own_call(model) and getattr(last, "activation", None) is keras.activations.linear:
        return  # certain without a computation
    x_1xT, _ = sequences.rows(np.zeros(1, np.int64))
    whole = mesh.plain and not isinstance(replica, GatheredReplica)
    # Eagerly if this rank has all weights: tracing takes as long as for a training step.
    logits_TxV = np.asarray(model(x_1xT, training=False)[0] if whole else runner.logits(x_1xT))
    if logits_TxV.shape[-1] < 2 or logits_TxV.min() < 0:
        return
    if np.allclose(logits_TxV.sum(axis=-1), 1.0, atol=1e-2):
        raise UsageError(
            f"the outputs of model {model.name!r} are probabilities: none is negative, and they add up to 1. "
            "A Trainer takes logits, and would take the softmax of a softmax, from which nearly nothing is "
            "learnt. Leave out the last softmax, as in Dense(vocabulary) without activation='softmax'; "
            "keras.ops.softmax(model(tokens)) gives the probabilities"
        )


def _has_own_call(model: keras.Model) -> bool:
    """Whether a model is neither Functional nor Sequential: its list of layers does not define it."""
    return not type(model).call.__module__.startswith("keras.src.")


def warn_of_foreign_loss(model: keras.Model, comm: Comm) -> None:
    """Warn that a Trainer does not use the loss given to ``model.compile``."""
    if comm.rank or not getattr(model, "compiled", False):
        return
    loss = getattr(model, "loss", None)
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    if loss is not None and name not in KNOWN_LOSSES:
        warnings.warn(
            f"the model was compiled with the loss {name}, which a Trainer does not use: it takes the "
            "cross-entropy of the next token. model.fit with tf_dist.distribute uses the compiled loss",
            stacklevel=5,
        )


def warn_of_random_draws(kinds: Sequence[str], comm: Comm) -> None:
    """Warn, on rank 0, of random numbers that depend on the number of ranks (`Replica.foreign_draws`)."""
    if kinds and comm.rank == 0:
        warnings.warn(
            f"the model draws random numbers by {', '.join(kinds)}, whose state is in each process: "
            "results depend on the number of ranks, and differ after a resume. Use keras.random instead",
            stacklevel=5,
        )


def report_fallback(replica: FlatParameters, comm: Comm) -> None:
    """Log why the optimizer does not step all variables at once, if it does not."""
    reason = replica.optimizer_step.reason
    if reason:
        once(LOG, comm).info(f"optimizer: {reason}, so it steps each variable by itself")
