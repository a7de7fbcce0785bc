"""Datasets derived from a `shard` dataset, without the sample weights that `shard` has added."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_dist.errors import UsageError
from tf_dist.keras_fit.dataset import BATCH, ROWS, Sharding


def without_weights(dataset: tf.data.Dataset, sharding: Sharding) -> tf.data.Dataset:
    """The same rows (`tf_dist.keras_fit.dataset.counted`), without those to which `shard` gave no weight.

    Raises:
        UsageError: the elements are not ``(x, y, sample_weight)`` any more.
    """
    if not sharding.weighted:
        return dataset
    if not isinstance(dataset.element_spec, tuple) or len(dataset.element_spec) != 3:
        raise UsageError(
            "this dataset was made from one of shard(), whose elements are (x, y, sample_weight), and has "
            "other elements: call shard() last, on the dataset that has them, or shard(..., weights=False)"
        )
    if sharding.weighted == "given":
        raise UsageError(
            "this dataset was made from one of shard() with sample weights, which shard() has multiplied by "
            "its own: call shard() last, or shard(..., weights=False)"
        )

    def rows(x: Any, y: Any, weight: Any) -> Any:
        there = tf.reshape(weight, (tf.shape(weight)[0], -1))[:, 0] > 0
        # Where none is left, all stay, and none counts: many kernels fail on no rows.
        kept = there | ~tf.reduce_any(there)

        def taken(leaf: Any) -> Any:
            ragged = isinstance(leaf, tf.RaggedTensor)
            return tf.ragged.boolean_mask(leaf, kept) if ragged else tf.boolean_mask(leaf, kept)

        count = tf.reduce_sum(tf.cast(there, tf.int32))
        return {BATCH: tf.nest.map_structure(taken, (x, y)), ROWS: count}

    return dataset.map(rows)
