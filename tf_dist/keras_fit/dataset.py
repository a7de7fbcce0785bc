"""`shard`: this rank's rows of every global batch; each example is read exactly once.

The number of ranks changes neither the batches nor the number of steps: each rank walks through the same
global batches and takes a contiguous block of the rows of each. Keras's ``fit`` and ``evaluate`` take the
rows as they are, and divide by the rows of all ranks. A loop of one's own gets sample weights that make the
mean over ranks the mean over rows. A rank without a row takes the first one, which counts for nothing: many
kernels (convolutions, CTC) fail on no rows.

Legend: G rows of a global batch, B rows of it on this rank, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import tensorflow as tf

from tf_dist.comm.runtime.communicators import as_comm
from tf_dist.comm.runtime.consensus import agree
from tf_dist.comm.transport.base import Comm
from tf_dist.data.sampler import Sampler
from tf_dist.errors import DataError, UsageError
from tf_dist.keras_fit.data_fingerprints import Fingerprints, digest
from tf_dist.keras_fit.examples import batches_of_keras, tensors_of

# A batch for Keras and how many of its rows count, in an element of `rows_of_rank`.
BATCH, ROWS = "tf_dist_batch", "tf_dist_rows"
# What Keras's fit(x, y) takes.
DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True)
class Sharding:
    """What `shard` knows of a dataset that it has made.

    Attributes:
        comm: all ranks.
        global_batches: as the user has given them; None: each rank brings a dataset of its own.
        weighted: whether elements have sample weights of `shard`; "given": times some of the user.
    """

    comm: Comm
    global_batches: tf.data.Dataset | None
    weighted: bool | str = False


def shard(
    data: Any,
    comm: Any,
    *,
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int = 1,
    weights: bool | None = None,
    training: bool = True,
    drop_remainder: bool = False,
    sharded: bool = False,
) -> tf.data.Dataset:
    """Share out examples among the ranks, for `model.fit`, `evaluate` or a loop; a collective.

    Args:
        data: ``x``, ``(x, y)`` or ``(x, y, sample_weight)``, each an array, a DataFrame of one type, a ragged
            tensor or a nest of these with as many rows; or a `tf.data.Dataset`, a `keras.utils.PyDataset`
            or a generator of such, in the same order on all ranks.
        comm: all ranks, from ``tf_dist.connect()``, or a communicator of mpi4py.
        batch_size: G, rows of all ranks in one step. Arrays: 32 by default. A dataset without
            it is one of global batches; with it, one of single examples.
        shuffle: whether arrays are shuffled anew in each epoch. A dataset keeps the order it has.
        seed: of that order, which is the same for any number of ranks.
        weights: for loops of one's own: whether elements are ``(x, y, sample_weight)``. None: where there is
            a ``y``. Without weights, the rows of every batch must divide by the number of ranks. In
            ``model.fit`` elements are as given, and rows need not divide, whatever this is.
        training: False: for ``evaluate`` and ``validation_data``. Rows are in their order and as they are,
            and results are those of one process, also where batches do not divide.
        drop_remainder: leave out a last batch of fewer than G rows.
        sharded: the dataset has this rank's rows already (`Dataset.shard`, a file for each rank): it is
            taken as it is. All ranks must have equally many batches.

    Returns:
        A dataset of this rank's batches. In training all ranks get equally many.

    Raises:
        DataError: no examples, arrays of different lengths, or an evaluation of fewer rows than ranks.
        LaunchError: on all ranks: their arrays are not the same.
        UsageError: a batch size below one, a form of data that cannot be shared out, or weights for something
            of more than three parts.
    """
    comm = as_comm(comm)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size {batch_size}: at least 1")
    if sharded:
        return _marked(_own(data, batch_size, drop_remainder), Sharding(comm, None))
    rows_G = batch_size or DEFAULT_BATCH_SIZE
    batches, length = batches_of_keras(data, batch_size), None
    if isinstance(batches, tf.data.Dataset):
        if batch_size is not None:
            length = int(batches.cardinality())
            batches = batches.batch(rows_G, drop_remainder=drop_remainder)
        if int(batches.cardinality()) == 0:
            raise DataError("the dataset is empty")
    else:
        order = seed if shuffle and training else None
        batches, length = _batches_of_arrays(tensors_of(data), comm, rows_G, order, drop_remainder)
    return _marked(*_rows_here(batches, comm, weights, training, length, rows_G))


def _batches_of_arrays(
    data: Any, comm: Comm, rows_G: int, seed: int | None, drop_remainder: bool
) -> tuple[tf.data.Dataset, int]:
    """Global batches of arrays that are the same on all ranks, and the number of rows; a collective."""
    length = _length(data)
    content = digest(tf.nest.flatten(tf.nest.map_structure(_sample, data)))
    facts = {"examples": length, "batch_size": rows_G, "seed": seed, "contents": content}
    agree(comm, facts, "the data")
    indices = _order(length, rows_G, seed)
    if drop_remainder and length >= rows_G:
        indices = indices.take(length // rows_G)
    return indices.map(lambda indices_G: _gather(data, indices_G)), length


def sharding_of(dataset: Any) -> Sharding | None:
    """What `shard` knows of a dataset of its own; None of any other."""
    found = getattr(dataset, "_tf_dist_sharding", None)
    return found if isinstance(found, Sharding) else None


def inherited_sharding(dataset: Any) -> Sharding | None:
    """The same for a dataset made from one of `shard`, by ``repeat()``, ``map()``, ``prefetch()`` ..."""
    found = sharding_of(dataset)
    for parent in dataset._inputs() if found is None and isinstance(dataset, tf.data.Dataset) else []:
        found = found or inherited_sharding(parent)
    return found


def block_of(rows_G: tf.Tensor, rank: int, size: int) -> tuple[Any, Any]:
    """Where the rows of a rank begin in a global batch, and how many they are; int32 scalars."""
    base, extra = rows_G // size, rows_G % size
    return rank * base + tf.minimum(rank, extra), base + tf.cast(rank < extra, tf.int32)


def rows_of_rank(batches: tf.data.Dataset, comm: Comm) -> tf.data.Dataset:
    """The rows of this rank of global batches, and how many of them count (`counted`), for Keras."""
    return _with_prints(batches, comm, partial(_counted_block, comm=comm)).prefetch(tf.data.AUTOTUNE)


def counted(element: Any) -> tuple[Any, Any]:
    """A batch, and how many of its rows count, () int32: all or none of them; None: all."""
    if isinstance(element, dict) and element.keys() == {BATCH, ROWS}:
        return element[BATCH], element[ROWS]
    return element, None


def _own(data: Any, batch_size: int | None, drop_remainder: bool) -> tf.data.Dataset:
    if not isinstance(data, tf.data.Dataset):
        raise UsageError("shard(..., sharded=True) takes a tf.data.Dataset with this rank's rows")
    if batch_size is not None:
        data = data.batch(batch_size, drop_remainder=drop_remainder)
    return data.prefetch(tf.data.AUTOTUNE)  # another object, to be marked


def _marked(dataset: tf.data.Dataset, sharding: Sharding) -> tf.data.Dataset:
    object.__setattr__(dataset, "_tf_dist_sharding", sharding)
    return dataset


def _rows_here(
    batches: tf.data.Dataset,
    comm: Comm,
    weights: bool | None,
    training: bool,
    length: int | None,
    rows_G: int,
) -> tuple[tf.data.Dataset, Sharding]:
    """The dataset that a loop of one's own walks through, and what Keras is given in its stead."""
    weighted: bool | str = False
    if training:
        parts = len(batches.element_spec) if isinstance(batches.element_spec, tuple) else 1
        if parts > 3 and weights is not False:
            raise UsageError(f"shard() takes (x, y, sample_weight) at most, not {parts} parts")
        if weights if weights is not None else parts > 1:
            weighted = "given" if parts == 3 else True
        mine = _with_prints(batches, comm, partial(_share, comm=comm, weighted=bool(weighted)))
    else:
        mine = _with_prints(batches, comm, partial(_block, comm=comm))
        mine = _without_empty(mine, length, rows_G, comm)
    return mine.prefetch(tf.data.AUTOTUNE), Sharding(comm, batches, weighted)


def _with_prints(batches: tf.data.Dataset, comm: Comm, take: Any) -> tf.data.Dataset:
    """``take(batch)`` of global batches, and a digest of each of them to compare over the ranks."""
    prints = Fingerprints(comm)

    def noted(index: Any, batch: Any) -> Any:
        with tf.control_dependencies([prints.noted(index, batch)]):
            return take(batch)

    mine = batches.enumerate().map(noted)
    object.__setattr__(mine, "_tf_dist_fingerprints", prints)  # they live as long as the dataset
    return mine


def _sample(tensor: Any) -> np.ndarray:
    if isinstance(tensor, tf.RaggedTensor):
        return np.concatenate([np.asarray(tensor.flat_values).reshape(-1), np.asarray(tensor.row_lengths())])
    return np.asarray(tensor)


def _length(data: Any) -> int:
    lengths = {int(_rows_of(tensor)) for tensor in tf.nest.flatten(data)}
    if len(lengths) != 1 or not min(lengths):
        raise DataError(
            f"shard() needs arrays with one number of examples, at least 1, not {sorted(lengths)}"
        )
    return lengths.pop()


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


def _share(batch: Any, comm: Comm, weighted: bool) -> Any:
    """The rows of this rank, with weights R B / G: then the mean of the ranks' means is that of the rows."""
    rows_G = _rows(batch)
    start, rows = block_of(rows_G, comm.rank, comm.size)
    # A rank without a row takes the first one, and gives it no weight.
    start, taken = tf.where(rows > 0, start, 0), tf.maximum(rows, 1)
    weight = tf.cast(comm.size * rows, tf.float32) / tf.cast(rows_G, tf.float32)
    part = _sliced(batch, start, taken)
    if weighted:
        return _weighted(part, tf.fill([taken], weight))
    told = (
        "a batch of shard() does not divide by the number of ranks, and without weights its mean over ranks "
        "would not be the mean over its rows: use weights=True, or drop_remainder=True"
    )
    with tf.control_dependencies([tf.debugging.assert_equal(rows_G % comm.size, 0, told)]):
        return tf.nest.map_structure(tf.identity, part)


def _block(batch: Any, comm: Comm) -> Any:
    """The rows of this rank, perhaps none, as they are."""
    return _sliced(batch, *block_of(_rows(batch), comm.rank, comm.size))


def _counted_block(batch: Any, comm: Comm) -> Any:
    start, rows = block_of(_rows(batch), comm.rank, comm.size)
    return {BATCH: _sliced(batch, tf.where(rows > 0, start, 0), tf.maximum(rows, 1)), ROWS: rows}


def _without_empty(mine: Any, length: int | None, rows_G: int, comm: Comm) -> Any:
    """Leave out batches of which this rank has no row; whoever walks likes to know how many remain."""
    mine = mine.filter(lambda *parts: _rows(parts) > 0)
    if length is None or length < 0:
        return mine
    if min(length, rows_G) < comm.size:
        raise DataError(
            f"{length} examples in batches of {rows_G} are too few for {comm.size} ranks: some would have "
            "none. Use larger batches, or evaluate on one rank"
        )
    batches = length // rows_G + (length % rows_G > comm.rank)
    return mine.apply(tf.data.experimental.assert_cardinality(batches))


def _gather(data: Any, indices: Any) -> Any:
    return tf.nest.map_structure(lambda tensor: tf.gather(tensor, indices), data)


def _sliced(batch: Any, start: Any, rows: Any) -> Any:
    def part(tensor: Any) -> Any:
        if isinstance(tensor, tf.SparseTensor):
            first = tf.one_hot(0, tf.size(tensor.dense_shape), tf.cast(start, tf.int64), 0, dtype=tf.int64)
            size = tf.concat([[tf.cast(rows, tf.int64)], tensor.dense_shape[1:]], 0)
            return tf.sparse.slice(tensor, first, size)
        has_rows = tf.is_tensor(tensor) and len(tensor.shape) > 0
        return tensor[start : start + rows] if has_rows else tensor  # a scalar, or an Optional of Keras's

    return tf.nest.map_structure(part, batch)


def _rows(batch: Any) -> Any:
    return next(rows for rows in map(_rows_of, tf.nest.flatten(batch)) if rows is not None)


def _rows_of(tensor: Any) -> Any:
    if isinstance(tensor, tf.RaggedTensor):
        return tf.cast(tensor.nrows(), tf.int32)
    if isinstance(tensor, tf.SparseTensor):
        return tf.cast(tensor.dense_shape[0], tf.int32)
    return tf.shape(tensor)[0] if tf.is_tensor(tensor) and len(tensor.shape) > 0 else None


def _weighted(part: Any, weights_B: tf.Tensor) -> Any:
    parts = part if isinstance(part, tuple) else (part,)
    x, y, given = (*parts, None, None)[:3]
    if given is None:
        return x, y, _for_targets(weights_B, y)
    times = partial(_times, weights_B=weights_B)
    return x, y, tf.nest.map_structure(times, given)


def _times(given: Any, weights_B: tf.Tensor) -> Any:
    return tf.cast(given, tf.float32) * _like(weights_B, given)


def _for_targets(weights_B: tf.Tensor, y: Any) -> Any:
    """Weights of rows; for targets of tokens (B, T, ...) with axes that their losses have as well."""
    tokens = not tf.nest.is_nested(y) and y is not None and y.dtype.is_integer and len(y.shape) > 1
    return _like(weights_B, y) if tokens else weights_B


def _like(weights_B: tf.Tensor, given: Any) -> Any:
    """Weights of rows with the axes of given ones, which may also be those of tokens."""
    return tf.reshape(weights_B, tf.concat([tf.shape(weights_B), tf.ones(tf.rank(given) - 1, tf.int32)], 0))
