"""Gradient hooks: gradients are handed over bucket by bucket, while TensorFlow computes the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tf_dist.errors import called_by_a_graph
from tf_dist.layers.mappings import keep_order
from tf_dist.parallel.buckets import BucketOverlap
from tf_dist.parallel.reduction_tree import BlockSum
from tf_dist.runners.replica import Replica


class OverlappedGradients:
    """Overlaps gradient reduction with the backward pass for a `Trainer`; a no-op without buckets.

    Args:
        replica: this rank's model.
        sums: of this rank.
        micro_batches: of this rank: the gradient of the last one completes its sums.
        chosen: buckets, or None.
    """

    def __init__(
        self, replica: Replica, sums: BlockSum, micro_batches: Sequence[int], chosen: BucketOverlap
    ) -> None:
        self._replica, self._sums, self._micro_batches = replica, sums, micro_batches
        self._buckets, self._said = chosen
        self._function: Callable[..., Any] | None = None

    @property
    def active(self) -> bool:
        """Whether gradients are overlapped; not with XLA, which compiles a full step without callbacks."""
        return self._buckets is not None and not self._replica.xla

    @property
    def said(self) -> str:
        """Status line."""
        if self._buckets is not None and not self.active:
            return "nothing leaves during the backward pass, because XLA compiles it"
        return self._said

    def leaves(self, micro_batch: int) -> bool:
        """Whether the gradient of a micro-batch is reduced while it is computed."""
        return self.active and micro_batch == self._micro_batches[-1]

    def gradients(self, x_BxT: np.ndarray, y_BxT: np.ndarray, draw: tuple[int, int]) -> np.ndarray:
        """As `Replica.gradients`, but the gradient goes to the sums of all ranks; returns the sums, (3,)."""
        assert self._buckets is not None
        if self._function is None:
            self._function = hooked_gradients(self._replica, self._buckets)
        self._buckets.begin()
        try:
            with self._replica.moving_restored():
                states = self._replica.random_states(draw)
                return np.asarray(self._function(x_BxT, y_BxT, states), np.float64)
        except BaseException:
            self._buckets.give_up()
            raise

    def terms(self) -> list[np.ndarray]:
        """Return the terms of this rank once all micro-batches were added; they may be in flight."""
        if self.active and not self._micro_batches:
            assert self._buckets is not None
            self._buckets.begin()
            self._buckets.add_empty()
        return self._sums.terms()


class BucketSink(Protocol):
    """Receives gradients bucket by bucket."""

    divided: list[range]

    def add(self, number: int, gradients: Sequence[np.ndarray]) -> None:
        """Receive the gradients of a bucket's variables."""


def hooked_gradients(replica: Replica, buckets: BucketSink) -> Callable[..., Any]:
    """A compiled function like that of `Replica.gradients` which hands its gradients to buckets.

    Returns:
        A function from token ids, targets and random states to the summed loss, targets and correct
        predictions. It re-raises an error in a bucket as TensorFlow's.
    """
    keep_order()  # buckets are reduced in one order on all ranks
    # Created here, where AutoGraph does not rewrite them.
    hooks = [_hook(buckets, number) for number in range(len(buckets.divided))]

    def graph(x_BxT: tf.Tensor, y_BxT: tf.Tensor, states: Any) -> Any:
        parts, sums = replica.gradients_and_sums(x_BxT, y_BxT, states)
        for hook, bucket in zip(hooks, buckets.divided, strict=True):
            # Stateful, so TensorFlow runs these calls in program order.
            tf.numpy_function(hook, [parts[i] for i in bucket], [], stateful=True)
        return sums

    function: Callable[..., Any] = tf.function(graph, input_signature=replica.gradients_signature)
    return function


def _hook(buckets: BucketSink, number: int) -> Callable[..., list[Any]]:
    def hook(*gradients: np.ndarray) -> list[Any]:
        buckets.add(number, gradients)
        return []

    unconverted: Callable[..., list[Any]] = tf.autograph.experimental.do_not_convert(called_by_a_graph(hook))
    return unconverted
