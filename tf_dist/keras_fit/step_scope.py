"""Per-step context of `fit` over several ranks, while a step is traced or runs eagerly.

The patches of Keras's losses, normalization and random numbers (`global_losses`, `global_batch_norm`,
`rank_randomness`) act inside of a scope only: everywhere else Keras is as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from tf_dist.keras_fit.gradient_reduction import Reduction


@dataclass(frozen=True)
class Law:
    """How the objective of the global batch follows from what each rank computes of its rows.

    Attributes:
        global_losses: Keras losses divide by the counts of all ranks. False: they stay each rank's own.
        gather_user_losses: loss functions of the user see the predictions and targets of all ranks.
        added: what `add_loss` values are: a "mean" over rows (or no matter of rows), or a "sum".
        gradients: what the gradients of a rank are, but for those of global losses: "global" already, or
            those of a "mean" or of a "sum" over its rows.
        logs: what numbers in the logs of a step are, where they are no means over rows (`step_logs`).
    """

    global_losses: bool = True
    gather_user_losses: bool = False
    added: str = "mean"
    gradients: str = "global"
    logs: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if not self.global_losses:
            return f"the loss is a {self.gradients} over rows"
        gathered = ", the loss sees the rows of all ranks" if self.gather_user_losses else ""
        gathered += f", the rest is a {self.gradients} over rows" if self.gradients != "global" else ""
        return f"losses are divided by the rows of all ranks{gathered}, add_loss is a {self.added} over rows"


@dataclass
class StepScope:
    """One step of one model.

    Attributes:
        reduction: over all ranks.
        law: of the objective.
        training: whether it is a training step; else one of an evaluation.
        data: this rank's rows.
        rows: how many of them count, () int32: all, or none where this rank has no row; None: all.
        model: whose step it is.
        captured: not None: optimizers add (their number, variables, gradients) here instead of stepping.
        gradient_scale: gradients of variables are this many times what they are.
        metric_rows: what metrics were given of all ranks, by graph and this rank's tensor: several share it.
    """

    reduction: Reduction
    law: Law
    training: bool
    data: Any
    rows: Any = None
    model: Any = None
    captured: list[Any] | None = None
    gradient_scale: float = 1.0
    metric_rows: dict[Any, Any] = field(default_factory=dict, repr=False)
    _rows: tuple[Any, Any] | None = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return self.reduction.comm.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.reduction.comm.size

    def share(self) -> tuple[Any, Any]:
        """The part B / G of the rows that this rank has, () float64, and whether it is above 0."""
        if self._rows is None:
            rows = tf.cast(self._counting(), tf.float64)
            (everyone,) = self.reduction.sums([rows], "the count of rows")
            self._rows = tf.math.divide_no_nan(rows, everyone), rows > 0
        return self._rows

    def row_scaled(self, gradient: Any) -> Any:
        """The gradient of a mean over this rank's rows, R B / G times: then its mean over ranks is right."""
        return gradient * tf.cast(self.size * self.share()[0], gradient.dtype)

    def unscaled(self, tensor: Any) -> Any:
        """The same tensor, of which a global loss is made: undoes what `row_scaled` does to its gradient."""
        if self.law.gradients != "mean":
            return tensor
        share, _ = self.share()

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def identity(one: Any) -> Any:
            undone = tf.math.divide_no_nan(tf.constant(1.0, share.dtype), self.size * share)
            return tf.identity(one), lambda upstream: upstream * tf.cast(undone, upstream.dtype)

        return identity(tensor)

    @property
    def any_rows(self) -> Any:
        """Whether rows of this rank count, () bool."""
        return self._counting() > 0

    def _counting(self) -> Any:
        return rows_of(self.data) if self.rows is None else self.rows

    def that_count(self, tensor: Any) -> Any:
        """The rows of a tensor (B, ...) that count: all or none."""
        return tensor if self.rows is None else tensor[: tf.where(self.rows > 0, tf.shape(tensor)[0], 0)]

    def gathered(self, tensor: Any, what: str) -> Any:
        """The rows (G, ...) of all ranks that count, of rows (B, ...) on each, with their Keras mask."""
        everyone = self.reduction.gather_rows(self.that_count(tensor), what)
        mask = keras.src.backend.get_keras_mask(tensor)
        if mask is not None:
            masks = self.reduction.gather_rows(self.that_count(mask), f"the mask of {what}")
            keras.src.backend.set_keras_mask(everyone, masks)
        return everyone

    def if_any(self, tensor: Any) -> Any:
        """A tensor that was computed of this rank's rows; zeros where none of them counts."""
        return tensor if self.rows is None else tf.where(self.rows > 0, tensor, tf.zeros_like(tensor))


_local = threading.local()


def active() -> StepScope | None:
    """The scope in which this thread is, or None."""
    stack: list[StepScope | None] = getattr(_local, "stack", [])
    return stack[-1] if stack else None


@contextmanager
def entered(scope: StepScope | None) -> Iterator[None]:
    """Be in a scope; None: in none, also inside of another one."""
    stack = _local.__dict__.setdefault("stack", [])
    stack.append(scope)
    try:
        yield
    finally:
        stack.pop()


def rows_of(data: Any) -> Any:
    """B, a scalar int32 tensor: rows of a batch, of its first tensor that has rows."""
    for leaf in tf.nest.flatten(data, expand_composites=False):
        if isinstance(leaf, tf.RaggedTensor):
            return tf.cast(leaf.nrows(), tf.int32)
        if isinstance(leaf, tf.SparseTensor):
            return tf.cast(leaf.dense_shape[0], tf.int32)
        if leaf is not None and len(leaf.shape) > 0:
            return tf.shape(leaf)[0]
    return tf.constant(1)
