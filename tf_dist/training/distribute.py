"""`distribute`: a Keras optimizer that means all ranks, for `model.fit` and loops of one's own.

The optimizer stays what it is and only its class changes, to a subclass that reduces gradients before
anything else is done with them. Keras then clips, accumulates, decays and averages as always, with
numbers that are the same on every rank. Saved files name the plain class: `__class__` says so.

Gradients of embeddings become dense on the way, so an id that a batch repeats has one gradient, the sum.
Keras 3.15 by itself squares the parts of it one by one in Adam, and takes longer steps there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.comm.agree import agree
from tf_dist.comm.base import Comm
from tf_dist.comm.settings import same_environment
from tf_dist.errors import UsageError
from tf_dist.training import callback_list, keras_hooks, self_test
from tf_dist.training.reduction import Reduction
from tf_dist.training.replicated import broadcast


def distribute(optimizer: keras.optimizers.Optimizer, comm: Comm) -> keras.optimizers.Optimizer:
    """Make an optimizer work for all ranks; a collective: call it on every rank.

    Every step uses the mean of the ranks' gradients, taken before clipping, weight decay and EMA. With
    ``gradient_accumulation_steps`` the ranks talk once for each accumulated gradient. When the optimizer
    is built, rank 0's weights and optimizer state replace those of the others.

    The mean is that of the global batch where all ranks have equally many rows in a step, or rows with the
    sample weights of `shard`.

    Args:
        optimizer: any Keras optimizer; it is changed, not copied.
        comm: all ranks, from ``tf_dist.connect()``.

    Returns:
        The same optimizer, with an attribute ``comm``.

    Raises:
        UsageError: not a Keras optimizer, or one that is distributed already.
        LaunchError: this version of Keras does not call us, or the ranks do not agree on versions or model.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise UsageError(
            f"distribute() takes a Keras optimizer, such as keras.optimizers.Adam(), not {optimizer!r}"
        )
    if keras_hooks.reduction_of(optimizer) is not None:
        raise UsageError(
            "this optimizer is distributed already: call distribute() once, on the outermost one"
        )
    keras_hooks.install()
    callback_list.install()
    same_environment(comm)
    self_test.run(_changed)
    _changed(optimizer, comm)
    if optimizer.built:  # it came out of a file
        optimizer.start()
    return optimizer


def _changed(optimizer: Any, comm: Comm) -> Any:
    """The optimizer, of a class that reduces; the class, and not the instance, knows the ranks."""
    plain = type(optimizer)
    names = {
        "comm": comm,
        "reduction": Reduction(comm),
        "visits": 0,
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
    """

    comm: Comm
    reduction: Reduction
    visits: int

    def build(self: Any, variables: Sequence[Any]) -> None:
        """Make the optimizer's state, and begin with that of rank 0."""
        was_built = self.built
        super().build(variables)  # type: ignore[misc]
        if not was_built:
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

    def apply(self: Any, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> Any:
        """Take one step with the mean of all ranks' gradients.

        Raises:
            UsageError: inside ``jit_compile=True``, or the gradients are those of different weights.
        """
        keras_hooks.refuse_xla()
        type(self).visits += 1
        if not self.built and trainable_variables is not None:
            self._build_late(trainable_variables)
        if not self.gradient_accumulation_steps:
            grads = self.reduction.mean(grads)
        return super().apply(grads, trainable_variables)  # type: ignore[misc]

    def _clip_gradients(self: Any, grads: Sequence[Any]) -> Any:
        """Keras calls this with each finished gradient: after accumulation, before anything else."""
        if self.gradient_accumulation_steps:
            grads = self.reduction.mean(grads)
        return super()._clip_gradients(grads)  # type: ignore[misc]

    def finalize_variable_values(self: Any, var_list: Sequence[Any]) -> None:
        """Keras calls this when `fit` ends: it must end on all ranks."""
        self.reduction.end()
        super().finalize_variable_values(var_list)  # type: ignore[misc]

    def _build_late(self: Any, trainable_variables: Sequence[Any]) -> None:
        """Build in the first step. In a loop without `tf.function`, its gradients are there already."""
        self.build(list(trainable_variables))
        different = np.array([float(self.replaced)])
        self.comm.allreduce(different)
        if different[0] and tf.executing_eagerly():
            raise UsageError(
                f"{int(different[0])} of {self.comm.size} ranks computed their first gradients with initial "
                "weights other than rank 0's. Call optimizer.build(model.trainable_variables) before the "
                "first step, which gives all ranks the weights of rank 0, or set one seed on all ranks"
            )


def _has_value(variable: Any) -> bool:
    native = variable.value if isinstance(variable, keras.Variable) else variable
    return not isinstance(native, tf.Variable) or bool(native.is_initialized())
