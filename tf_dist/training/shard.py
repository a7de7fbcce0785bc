"""`shard`: this rank's rows of every global batch, so that all examples are seen once.

The number of ranks changes neither the batches nor the number of steps: each rank walks through the same
global batches and takes a contiguous block of the rows of each. Where rows do not divide, sample weights
make the mean over ranks the mean over rows; a rank without a row takes one of weight zero. An evaluation
has no mean over ranks: metrics sum over rows, so it needs no weights, and a rank may lack a batch.

Legend: G rows of a global batch, B rows of it on this rank, R ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.comm.agree import agree
from tf_dist.comm.base import Comm
from tf_dist.data.sampler import Sampler
from tf_dist.errors import DataError, UsageError

# What Keras's fit(x, y) takes.
DEFAULT_BATCH_SIZE = 32


def shard(
    data: Any,
    comm: Comm,
    *,
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int = 1,
    weights: bool | None = None,
    training: bool = True,
) -> tf.data.Dataset:
    """Share out examples among the ranks, for `model.fit`, `evaluate` or a loop; a collective.

    Args:
        data: ``x``, ``(x, y)`` or ``(x, y, sample_weight)``, each an array or a nest of arrays with as
            many rows; or a `tf.data.Dataset` of such, in the same order on all ranks.
        comm: all ranks, from ``tf_dist.connect()``.
        batch_size: G, rows of all ranks in one step. Arrays: 32 by default. A dataset without
            it is one of global batches; with it, one of single examples.
        shuffle: whether arrays are shuffled anew in each epoch. A dataset keeps the order it has.
        seed: of that order, which is the same for any number of ranks.
        weights: whether elements are ``(x, y, sample_weight)``. None: where there is a ``y``. Without
            weights, the rows of every batch must divide by the number of ranks.
        training: False: for ``evaluate`` and ``validation_data``. Rows are in their order and as they are,
            and results are those of one process, also where batches do not divide.

    Returns:
        A dataset of this rank's batches. In training all ranks get equally many.

    Raises:
        DataError: no examples, arrays of different lengths, or an evaluation of fewer rows than ranks.
        LaunchError: the ranks' datasets do not begin with the same batch.
        UsageError: a batch size below one, or weights for something of more than three parts.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size {batch_size}: at least 1")
    share = partial(_share, comm=comm, weights=weights) if training else partial(_block, comm=comm)
    rows_G, length = batch_size or DEFAULT_BATCH_SIZE, None
    if isinstance(data, tf.data.Dataset):
        batches = data if batch_size is None else data.batch(rows_G)
        _check_first(batches, comm)
        mine = batches.map(lambda *parts: share(_element(parts), tf.range(_rows(parts))))
        if batch_size is not None and data.cardinality() >= 0:
            length = int(data.cardinality())
    else:
        tensors, length = _tensors(data)
        order = seed if shuffle and training else None
        agree(comm, {"examples": length, "batch_size": rows_G, "seed": order}, "the data")
        mine = _order(length, rows_G, order).map(lambda indices_G: share(tensors, indices_G))
    if not training:
        mine = _without_empty(mine, length, rows_G, comm)
    return mine.prefetch(tf.data.AUTOTUNE)


def _tensors(data: Any) -> tuple[Any, int]:
    """Arrays as tensors, and how many examples they hold."""
    data = tuple(data) if isinstance(data, list) else data
    lengths = {len(array) for array in tf.nest.flatten(data)}
    if len(lengths) != 1 or not min(lengths):
        raise DataError(
            f"shard() needs arrays with one number of examples, at least 1, not {sorted(lengths)}"
        )
    return tf.nest.map_structure(tf.convert_to_tensor, data), lengths.pop()


def _order(length: int, rows_G: int, seed: int | None) -> tf.data.Dataset:
    """The indices of each global batch; with a seed, another order each time it is walked through.

    Not `tf.data.Dataset.shuffle`: that also depends on TensorFlow's global seed, which may be another one
    on each rank, and then some examples would be seen twice and others never.
    """
    if seed is None:
        return tf.data.Dataset.range(length).batch(rows_G)
    sampler, epochs = Sampler(length, min(rows_G, length), seed), count()
    steps = sampler.steps_per_epoch

    def batches() -> Iterator[np.ndarray]:
        first = next(epochs) * steps
        for step in range(first, first + steps):
            indices_G = sampler.batch(step)
            yield indices_G[indices_G >= 0].astype(np.int64)

    spec = tf.TensorSpec((None,), tf.int64)
    return tf.data.Dataset.from_generator(batches, output_signature=spec).apply(
        tf.data.experimental.assert_cardinality(steps)
    )


def _share(data: Any, indices_G: Any, comm: Comm, weights: bool | None) -> Any:
    """The rows of this rank, with weights R B / G: then the mean of the ranks' means is that of the rows."""
    rows_G = tf.size(indices_G)
    start, rows = _my_block(rows_G, comm)
    # A rank without a row takes the first one, and gives it no weight.
    start, taken = tf.where(rows > 0, start, 0), tf.maximum(rows, 1)
    weight = tf.cast(comm.size * rows, tf.float32) / tf.cast(rows_G, tf.float32)
    part = _gather(data, indices_G[start : start + taken])
    return _weighted(part, tf.fill([taken], weight), weights, rows_G, comm)


def _block(data: Any, indices_G: Any, comm: Comm) -> Any:
    """The rows of this rank, perhaps none, as they are."""
    start, rows = _my_block(tf.size(indices_G), comm)
    return _gather(data, indices_G[start : start + rows])


def _without_empty(mine: Any, length: int | None, rows_G: int, comm: Comm) -> Any:
    """Leave out batches of which this rank has no row; Keras likes to know how many remain."""
    mine = mine.filter(lambda *parts: _rows(parts) > 0)
    if length is None:
        return mine
    if min(length, rows_G) < comm.size:
        raise DataError(
            f"{length} examples in batches of {rows_G} are too few for {comm.size} ranks: some would have "
            "none. Use larger batches, or evaluate on one rank"
        )
    batches = length // rows_G + (length % rows_G > comm.rank)
    return mine.apply(tf.data.experimental.assert_cardinality(batches))


def _my_block(rows_G: Any, comm: Comm) -> tuple[Any, Any]:
    """Where this rank's rows begin, and how many they are."""
    base, extra = rows_G // comm.size, rows_G % comm.size
    return comm.rank * base + tf.minimum(comm.rank, extra), base + tf.cast(comm.rank < extra, tf.int32)


def _gather(data: Any, indices_B: Any) -> Any:
    return tf.nest.map_structure(lambda tensor: tf.gather(tensor, indices_B), data)


def _rows(parts: Any) -> Any:
    return tf.shape(tf.nest.flatten(parts)[0])[0]


def _weighted(part: Any, weights_B: Any, weights: bool | None, rows_G: Any, comm: Comm) -> Any:
    parts = part if isinstance(part, tuple) else (part,)
    if len(parts) > 3:
        raise UsageError(f"shard() takes (x, y, sample_weight) at most, not {len(parts)} parts")
    x, y, given = (*parts, None, None)[:3]
    if weights if weights is not None else y is not None:
        return x, y, weights_B if given is None else tf.cast(given, tf.float32) * _like(weights_B, given)
    told = (
        "a batch of shard() does not divide by the number of ranks, and without weights its mean over ranks "
        "would not be the mean over its rows: use weights=True, or leave the remainder out"
    )
    with tf.control_dependencies([tf.debugging.assert_equal(rows_G % comm.size, 0, told)]):
        return tf.nest.map_structure(tf.identity, part)


def _like(weights_B: Any, given: Any) -> Any:
    """Weights of rows with the axes of given ones, which may also be those of tokens."""
    return tf.reshape(weights_B, tf.concat([tf.shape(weights_B), tf.ones(tf.rank(given) - 1, tf.int32)], 0))


def _element(parts: tuple[Any, ...]) -> Any:
    return parts[0] if len(parts) == 1 else parts


def _check_first(batches: tf.data.Dataset, comm: Comm) -> None:
    """Every example is seen once only if all ranks read the same batches: compare the first ones."""
    first = next(iter(batches), None)
    digest = "nothing" if first is None else _digest(first)
    agree(
        comm, {"first batch": digest}, "the data (an order of one's own on each rank? give shuffle() a seed)"
    )
    if first is None:
        raise DataError("the dataset is empty")


def _digest(batch: Any) -> str:
    sha = hashlib.sha256()
    for tensor in tf.nest.flatten(batch):
        array = np.asarray(tensor)
        sha.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    return sha.hexdigest()[:16]
