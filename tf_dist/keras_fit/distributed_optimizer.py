"""A Keras optimizer that averages gradients over all ranks.

The optimizer stays what it is and only its class changes, to a subclass that reduces gradients before
anything else is done with them. Keras then clips, accumulates, decays and averages as always, with
numbers that are the same on every rank. Saved files name the plain class: `__class__` says so.

Gradients of embeddings stay slices where the optimizer tells an id that a batch repeats from their sum: Keras
3.15 squares the parts of it one by one in Adam, and a step over ranks is that of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from tf_dist.comm.runtime.consensus import agree
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.keras_callbacks.replica_sync import broadcast, starts_are_deferred
from tf_dist.keras_fit.gradient_law import by_law
from tf_dist.keras_fit.gradient_reduction import Reduction, order_after
from tf_dist.keras_fit.names import name_of
from tf_dist.keras_fit.step_scope import active
from tf_dist.parallel.aggregator import Aggregator


def made_distributed(optimizer: Any, comm: Comm, aggregator: Aggregator | None = None) -> Any:
    """The optimizer, of a class that reduces; the class, and not the instance, knows the ranks.

    Args:
        optimizer: is changed.
        comm: all ranks.
        aggregator: sums dense gradients; None: `Automatic`.
    """
    plain = type(optimizer)
    names = {
        "comm": comm,
        "reduction": Reduction(comm, aggregator),
        "visits": 0,
        "started": False,
        "__doc__": plain.__doc__,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        # Keras writes `optimizer.__class__` into files. Python itself looks at the type.
        "__class__": property(lambda self: plain),
    }
    # Past Keras's own __setattr__, which would track the class as if it were state.
    object.__setattr__(optimizer, "__class__", type(plain.__name__, (Distributed, plain), names))
    return optimizer


class Distributed:
    """What a distributed optimizer does otherwise than its plain class.

    Attributes:
        comm: all ranks.
        reduction: the mean over them.
        visits: times that Keras has called `apply`, eagerly or to trace it.
        started: whether its state is that of rank 0.
    """

    comm: Comm
    reduction: Reduction
    visits: int
    started: bool

    def build(self: Any, variables: Sequence[Any]) -> None:
        """Make the optimizer's state, and begin with that of rank 0; `model.fit` shares it out by itself."""
        was_built = self.built
        super().build(variables)  # type: ignore[misc]
        if not was_built and not starts_are_deferred():
            self.start()

    def start(self: Any) -> None:
        """Give every rank the trainable weights and optimizer state of rank 0; a collective.

        Raises:
            LaunchError: the ranks do not agree on the shapes of the weights, or on the optimizer.
            UsageError: inside a `tf.function` that makes the weights as well: they have no values yet.
        """
        tracing = not tf.executing_eagerly()
        with tf.init_scope():
            # State made while a function is traced has no values before it runs, and begins alike anyway.
            variables = [*self._trainable_variables, *([] if tracing else self.variables)]
            if not all(_has_value(variable) for variable in variables):
                raise UsageError(
                    "the model's weights would be made inside tf.function: they cannot be those of rank 0. "
                    "Build it before the first step: call the model on a batch, then "
                    "optimizer.build(model.trainable_variables)"
                )
            shapes = [f"{variable.dtype}{tuple(variable.shape)}" for variable in variables]
            agree(self.comm, {"optimizer": type(self).__name__, "variables": shapes}, "the model")
            self.replaced = broadcast(variables, self.comm)
            type(self).started = True

    def apply(self: Any, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> Any:
        """Take one step with the mean of all ranks' gradients.

        Raises:
            UsageError: inside ``jit_compile=True``, or the gradients are those of different weights.
            LaunchError: on all ranks: they bring gradients of different variables.
        """
        refuse_xla()
        type(self).visits += 1
        grads, scope = list(grads), active()
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        if scope is not None and scope.captured is not None:
            scope.captured.append((self, variables, grads))
            return None
        if not self.started and not starts_are_deferred():
            self._start_late(variables)
        if scope is not None:
            grads = by_law(grads, scope)
        overwriting = [getattr(variable, "overwrite_with_gradient", False) for variable in variables]
        if any(overwriting) and not self.reduction.aggregator.exact:
            raise UsageError(
                f"aggregator {self.reduction.aggregator} with variables whose gradient is their next value "
                "(scales of float8): what is kept back of a value never comes. Use aggregator 'auto'"
            )
        names = [name_of(variable) for variable in variables]
        if not self.gradient_accumulation_steps:
            data = None if scope is None else scope.data
            grads = self.reduction.mean(grads, names, sparse=_needs_slices(self), data=data)
        elif any(overwriting):
            grads = self._mean_of_overwriting(grads, variables, overwriting)
        super().apply(grads, trainable_variables)  # type: ignore[misc]
        order_after(end_of_step(self))
        return None

    def _mean_of_overwriting(
        self: Any, grads: list[Any], variables: list[Any], overwriting: list[bool]
    ) -> list[Any]:
        """Reduce what Keras stores in place of a variable in each step, before it accumulates the rest."""
        chosen = [grad if mine else None for grad, mine in zip(grads, overwriting, strict=True)]
        means = self.reduction.mean(chosen, [name_of(variable) for variable in variables])
        return [mean if mine else grad for mean, grad, mine in zip(means, grads, overwriting, strict=True)]

    def _clip_gradients(self: Any, grads: Sequence[Any]) -> Any:
        """Keras calls this with each finished gradient: after accumulation, before anything else."""
        if self.gradient_accumulation_steps:
            shapes = [f"variable {number} {tuple(grad.shape)}" for number, grad in enumerate(grads)]
            grads = self.reduction.mean(grads, shapes)
        return super()._clip_gradients(grads)  # type: ignore[misc]

    def finalize_variable_values(self: Any, var_list: Sequence[Any]) -> None:
        """Keras calls this when `fit` ends: it must end on all ranks."""
        self.reduction.end()
        super().finalize_variable_values(var_list)  # type: ignore[misc]

    def _start_late(self: Any, trainable_variables: list[Any]) -> None:
        """Begin as rank 0 in the first step. Without `tf.function`, its gradients are there already."""
        was_built = self.built
        if was_built:  # it came out of a file, or was built before it was distributed
            self.start()
        else:
            self.build(trainable_variables)
        different = np.array([float(self.replaced)])
        self.comm.allreduce(different)
        if different[0] and tf.executing_eagerly():
            raise UsageError(
                f"{int(different[0])} of {self.comm.size} ranks computed their first gradients with initial "
                "weights other than rank 0's. Call optimizer.build(model.trainable_variables) before the "
                "first step, which gives all ranks the weights of rank 0, or set one seed on all ranks"
            )


def check_aggregator(aggregator: Aggregator, optimizer: Any) -> None:
    """Refuse an aggregator whose sums this optimizer cannot use.

    Raises:
        UsageError: with what would do.
    """
    if not aggregator.exact and isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UsageError(
            f"aggregator {aggregator} with a LossScaleOptimizer: what it keeps of a gradient may have "
            "another scale in the next step. Distribute the inner optimizer: compile() scales around it"
        )
    if aggregator.of_momentum and not isinstance(optimizer, keras.optimizers.SGD):
        raise UsageError(
            f"aggregator {aggregator} with {type(optimizer).__name__}: what signs lose is made up for "
            "only in steps that are linear in gradients. Use keras.optimizers.SGD, or 1-bit Adam of a Trainer"
        )


def end_of_step(optimizer: Any) -> Any:
    """A number that is read after a step of an optimizer, () of any type.

    Accumulated gradients cross in a branch, which writes the accumulators; the count is written beside it.
    """
    if optimizer.gradient_accumulation_steps:
        return tf.reshape(optimizer._accumulated_gradients[0].value, (-1,))[0]
    return tf.convert_to_tensor(optimizer._iterations.value)


def _needs_slices(optimizer: Any) -> bool:
    """Whether a gradient of an id that occurs twice counts otherwise than the sum of its two parts.

    Keras's Adam squares the parts one by one, and norms are those of the parts. SGD adds them up, and needs
    but one dense gradient to cross.
    """
    clips = optimizer.clipnorm is not None or optimizer.clipvalue is not None
    clips = clips or optimizer.global_clipnorm is not None or optimizer.weight_decay is not None
    return clips or not isinstance(optimizer, keras.optimizers.SGD)


def refuse_xla() -> None:
    """Complain while a function is traced for XLA.

    Raises:
        UsageError: it is.
    """
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise UsageError(
            "a distributed optimizer cannot be called inside jit_compile=True: XLA has no way out to the "
            "other ranks. Use jit_compile=False, or compile only the function that computes the gradients"
        )


def _has_value(variable: Any) -> bool:
    native = variable.value if isinstance(variable, keras.Variable) else variable
    return not isinstance(native, tf.Variable) or bool(native.is_initialized())
