"""Two places of Keras that an optimizer cannot reach by itself; patched once, for distributed ones only.

* `LossScaleOptimizer.check_finite`: Keras puts a `LossScaleOptimizer` around the optimizer of a
  mixed_float16 model, and a step must be skipped by all ranks or by none.
* `Model.make_train_function`: the compiled step must not be XLA's, which no message can leave; the
  weights that no optimizer knows (moving averages) begin as rank 0's; and the first step must have
  gone through us.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from tf_dist import terminal
from tf_dist.comm.base import Comm
from tf_dist.errors import LaunchError, UsageError, behind
from tf_dist.training.replicated import broadcast

_installed: set[str] = set()


def install() -> None:
    """Patch Keras; any further call changes nothing."""
    if _installed:
        return
    _installed.update(("check_finite", "make_train_function"))
    scaler, model = keras.optimizers.LossScaleOptimizer, keras.Model
    scaler.check_finite = _on_all_ranks(scaler.check_finite)
    model.make_train_function = _for_all_ranks(model.make_train_function)


def reduction_of(optimizer: Any) -> Any:
    """The `Reduction` of a distributed optimizer, also inside a `LossScaleOptimizer`; or None."""
    inner = getattr(optimizer, "inner_optimizer", None)
    return getattr(optimizer, "reduction", None) or getattr(inner, "reduction", None)


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


def _on_all_ranks(check_finite: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(check_finite)
    def check(self: Any, grads: Any) -> Any:
        finite = check_finite(self, grads)
        # A distributed LossScaleOptimizer has reduced already what it asks about.
        reduction = getattr(self.inner_optimizer, "reduction", None)
        return reduction.all_finite(finite) if reduction else finite

    return check


def _for_all_ranks(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def make_train_function(self: Any, force: bool = False) -> Any:
        known = self.train_function
        reduction = reduction_of(self.optimizer)
        if reduction is None or (known is not None and not force):
            return make(self, force)
        jit_compile = self.jit_compile
        if jit_compile and reduction.comm.rank == 0:
            terminal.write(
                "jit_compile: training steps are compiled without XLA, which cannot reach the other ranks"
            )
        self.jit_compile = False
        try:
            made = make(self, force)
        finally:
            self.jit_compile = jit_compile
        self.train_function = _checked(self, self.train_function)
        return made

    return make_train_function


def _checked(model: Any, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The training function; its first step must go through us, and our errors come out as ours."""
    optimizer = model.optimizer
    ours = optimizer if hasattr(type(optimizer), "visits") else optimizer.inner_optimizer
    visits, begun = type(ours).visits, False

    def checked(data: Any) -> Any:
        nonlocal begun
        if not begun:
            _begin_as_rank_0(model, data, ours.reduction.comm)
            begun = True
        try:
            logs = function(data)
        except tf.errors.OpError as error:
            cause = behind(error)
            if cause is not error:
                raise cause from None
            raise
        if type(ours).visits == visits:
            raise LaunchError(f"a training step did not call the distributed optimizer. {NOT_CALLED}")
        return logs

    return checked


def _begin_as_rank_0(model: Any, data: Any, comm: Comm) -> None:
    """Build what is not yet built, so that the first gradients are those of rank 0's weights already.

    Keras on TensorFlow would build inside the first traced step, where new variables have no values.
    """
    if not all(layer.built for layer in model._flatten_layers()):
        spec = getattr(data, "element_spec", None)
        if spec is None:
            raise UsageError("build the model before train_on_batch: call it on a batch of data")
        model._symbolic_build(data_batch=spec)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    broadcast(model.non_trainable_weights, comm)


NOT_CALLED = (
    f"Keras {keras.__version__} does not call Optimizer.apply as the versions do that tf_dist was made for: "
    "training would run unsynchronised. Use Keras 3.13 to 3.15, or tf_dist.Trainer"
)
