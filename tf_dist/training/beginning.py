"""What is settled before the first step of a `Trainer`, so that all ranks train one model.

Ranks that mean something else are told what differs (`facts`). Then rank 0's values are everybody's: all
weights, also those that are not trained, before the optimizer makes state of them. And what no comparison of
options can see, code that does something else on one rank, is seen in numbers: every rank computes the
gradient of the same rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from tf_dist.comm.agree import agree_on_many
from tf_dist.comm.base import Comm
from tf_dist.comm.words import named
from tf_dist.data.sampler import Sampler
from tf_dist.data.tokens import Sequences
from tf_dist.errors import LaunchError, UsageError
from tf_dist.models.head import head_of
from tf_dist.models.outline import is_outline
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.parts import part_of
from tf_dist.training import facts
from tf_dist.training.gathered import GatheredReplica
from tf_dist.training.moving import WAYS_OUT, refuse_moving
from tf_dist.training.replica import Replica
from tf_dist.training.replicated import is_distributed

if TYPE_CHECKING:
    from tf_dist.training.trainer import Trainer

BUILD_ALIKE = (
    "Build the same model in the same order on every rank: a Python set, for one, has another order in each "
    "process (use a list, or sorted())"
)
GIVE_ALIKE = "Give every rank the same arguments: nothing in them may depend on the rank"
SAME_DATA = "Give every rank all of the data, in one order: a Trainer shares it out itself"
# By how much the same gradient may differ between processors of two kinds, relative to its norm: rounding is
# far below, another activation or loss far above.
TOLERANCE, TOLERANCE_OF_SHORT_FLOATS = 1e-2, 1e-1
# A weight's gradient below this share of the whole one's norm is rounding, and not compared.
OF_THE_WHOLE = 1e-4
# What `model.compile` may have been given: the loss that a Trainer has.
KNOWN_LOSSES = ("sparse_categorical_crossentropy", "SparseCategoricalCrossentropy")


def refuse_distributed(optimizer: Any) -> None:
    """Refuse an optimizer that talks to other ranks itself.

    Raises:
        UsageError: it was given to `tf_dist.distribute`.
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
    agree_on_many(comm, facts.of_options(options), "the options of the Trainer", GIVE_ALIKE)


def agree_on_model(model: keras.Model, optimizer: Any, mesh: Mesh) -> None:
    """Compare weights, layers and the optimizer, before anything is made of them; a collective.

    Raises:
        LaunchError: on every rank, naming the first weights, layers or parameters that differ.
    """
    agree_on_weights(model, mesh)
    agree_on_many(mesh.replicas, facts.of_layers(model), "the model", BUILD_ALIKE)
    agree_on_many(mesh.all, facts.of_optimizer(optimizer), "the optimizer", GIVE_ALIKE)


def agree_on_weights(model: keras.Model, mesh: Mesh) -> None:
    """Compare paths, shapes and order of a built model's weights; a collective.

    Raises:
        LaunchError: on every rank, naming the first ones that differ.
    """
    agree_on_many(mesh.all, facts.of_weights(model), "the weights of the model", BUILD_ALIKE)


def agree_on_data(
    comm: Comm, sequences: Sequences, held_out: Sequences | None, options: Mapping[str, Any]
) -> None:
    """Compare what `fit` is given; a collective.

    Raises:
        LaunchError: on every rank, naming what differs.
    """
    agree_on_many(comm, facts.of_options(options), "the arguments of fit", GIVE_ALIKE)
    data = {"tokens": facts.of_array(sequences.tokens)}
    if held_out is not None:
        data["validation"] = facts.of_array(held_out.tokens)
    agree_on_many(comm, data, "the data", SAME_DATA)


# Values ---------------------------------------------------------------------------------------------


def give_weights(model: keras.Model, mesh: Mesh) -> None:
    """Give all ranks rank 0's weights, trained or not; a collective.

    Of a model whose layers are divided, each part is given to the ranks that have the same one.
    """
    whole = [v for v in model.weights if not is_outline(v)]
    if mesh.tensor.size == 1:
        give(whole, mesh.all)
        return
    give(whole, mesh.replicas)
    give([v for v in whole if part_of(v).ranges is None], mesh.tensor)


def give(variables: Iterable[Any], comm: Comm) -> None:
    """Give all ranks of a Comm the values of its first one, of whatever dtype; a collective."""
    if comm.size == 1:
        return
    for variable in variables:
        array = np.array(np.asarray(variable.value))
        comm.broadcast(array.reshape(-1).view(np.uint8))
        if comm.rank:
            variable.assign(array)


def find_moving(trainer: Trainer) -> None:
    """Find the weights that the model changes itself, such as the averages of BatchNormalization.

    Raises:
        UsageError: ranks could not keep them equal, with a way out.
    """
    replica, strategy = trainer.replica, trainer.strategy
    alike = strategy.traits.replicas_equal and trainer.mesh.plain
    if not isinstance(replica, Replica) or isinstance(replica, GatheredReplica):
        refuse_moving(trainer.model, "ranks share the model")
        return
    replica.find_moving()
    if replica.moving and not alike:
        found = replica.moving.variables[0].path
        raise UsageError(
            f"training changes {found} by itself: each rank would keep its own averages with strategy "
            f"{strategy} on {trainer.mesh}. {WAYS_OUT}"
        )


# Numbers --------------------------------------------------------------------------------------------


def compare_gradients(trainer: Trainer, sequences: Sequences, sampler: Sampler) -> None:
    """Let all ranks compute the gradient of the same rows with the same weights; a collective.

    Where ranks share a model, each computes something else, and nothing is compared.

    Raises:
        LaunchError: on every rank, naming the weight and the ranks: they compute different ones.
    """
    replica = trainer.replica
    if trainer.comm.size == 1 or not trainer.mesh.plain or isinstance(replica, GatheredReplica):
        return
    assert isinstance(replica, Replica)
    if replica.foreign_draws():  # of which the Trainer warns
        return
    step = trainer.step
    rows_G = sampler.batch(trainer.spikes.batch_of(step))
    batch = trainer.micro_batch(sequences, 0, rows_G)
    gradient, sums = replica.gradients(batch.x_BxT, batch.y_BxT, (step, 0))
    starts = replica.layout.starts
    norms = [float(np.linalg.norm(gradient[a:b])) for a, b in pairwise(starts)]
    everyone = trainer.comm.allgather_obj([float(sums[0]), *norms], what="the comparison of gradients")
    names = ["the loss", *(f"the gradient of {v.path}" for v in replica.variables)]
    _compare(np.array(everyone, np.float64), trainer.comm.broadcast_obj(names), replica.model)


def _compare(norms_RxN: np.ndarray, names: list[str], model: keras.Model) -> None:
    if not np.isfinite(norms_RxN).all():
        return  # the first step is the one to say so
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


def refuse_probabilities(trainer: Trainer, sequences: Sequences) -> None:
    """Refuse a model that ends in softmax: a Trainer takes its outputs for logits. A collective.

    Raises:
        UsageError: on every rank, with a way out.
    """
    model = trainer.model
    if head_of(model) is not None:  # ours, which end in a product with the table of the embedding
        return
    last = (getattr(model, "layers", None) or [None])[-1]
    if not _has_own_call(model) and getattr(last, "activation", None) is keras.activations.linear:
        return  # nothing is to be computed
    x_1xT, _ = sequences.rows(np.zeros(1, np.int64))
    whole = trainer.mesh.plain and not isinstance(trainer.replica, GatheredReplica)
    # Eagerly, where this rank has all weights: a trace takes as long as that of a training step.
    logits_TxV = np.asarray(model(x_1xT, training=False)[0] if whole else trainer.passes.logits(x_1xT))
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
    """Whether a model is something else than Keras's Functional or Sequential: its layers tell nothing."""
    return not type(model).call.__module__.startswith("keras.src.")


def warn_of_foreign_loss(model: keras.Model, comm: Comm) -> None:
    """Say that a loss given to ``model.compile`` is not the one that a Trainer has."""
    if comm.rank or not getattr(model, "compiled", False):
        return
    loss = getattr(model, "loss", None)
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    if loss is not None and name not in KNOWN_LOSSES:
        warnings.warn(
            f"the model was compiled with the loss {name}, which a Trainer does not use: it takes the "
            "cross-entropy of the next token. model.fit with tf_dist.distribute uses the compiled loss",
            stacklevel=4,
        )
