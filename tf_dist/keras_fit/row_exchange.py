"""Exchange single rows of a batch, of any tensor type, between ranks, outside of graphs."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.comm.transport.base import Comm


def first_rows(batch: Any, count: int) -> Any:
    """At most so many rows of each tensor of a batch; what has no rows as it is."""

    def first(leaf: Any) -> Any:
        if isinstance(leaf, tf.SparseTensor):
            size = tf.concat([[min(count, int(leaf.dense_shape[0]))], leaf.dense_shape[1:]], 0)
            return tf.sparse.slice(leaf, tf.zeros_like(size), size)
        has_rows = (tf.is_tensor(leaf) or isinstance(leaf, np.ndarray)) and len(leaf.shape) > 0
        return leaf[:count] if has_rows else leaf

    return keras.tree.map_structure(first, batch)


def rows_again(batch: Any, count: int) -> Any:
    """So many rows of each tensor of a batch: the first ones, and those again where it has fewer."""
    return _taken(batch, lambda rows: np.arange(count) % rows)


def rows_reversed(batch: Any) -> Any:
    """The rows of each tensor of a batch, the last one first."""
    return _taken(batch, lambda rows: np.arange(rows)[::-1])


def _taken(batch: Any, chosen: Callable[[int], np.ndarray]) -> Any:
    """Some rows of each tensor, by their indices, from its number of rows; what has no rows as it is."""

    def taken(leaf: Any) -> Any:
        if isinstance(leaf, tf.SparseTensor):
            return tf.sparse.from_dense(taken(tf.sparse.to_dense(leaf)))
        if not (tf.is_tensor(leaf) or isinstance(leaf, np.ndarray)) or not len(leaf.shape):
            return leaf
        rows = int(leaf.nrows() if isinstance(leaf, tf.RaggedTensor) else leaf.shape[0])
        return tf.gather(leaf, chosen(rows))

    return keras.tree.map_structure(taken, batch)


def rows_of_all(batch: Any, comm: Comm) -> Any:
    """The rows of all ranks, in their order; a collective."""
    leaves = keras.tree.flatten(batch)
    everyone = comm.allgather_obj([_packed(leaf) for leaf in leaves])
    whole = [_joined(leaf, [theirs[i] for theirs in everyone]) for i, leaf in enumerate(leaves)]
    return keras.tree.pack_sequence_as(batch, whole)


def _packed(leaf: Any) -> Any:
    if isinstance(leaf, tf.RaggedTensor | tf.SparseTensor):
        leaf = leaf if isinstance(leaf, tf.RaggedTensor) else tf.sparse.to_dense(leaf)
        return leaf.to_list() if isinstance(leaf, tf.RaggedTensor) else _packed(leaf)
    if (not tf.is_tensor(leaf) and not isinstance(leaf, np.ndarray)) or not len(leaf.shape):
        return None
    array = np.asarray(leaf)
    if array.dtype == object:
        texts = [
            base64.b64encode(one if isinstance(one, bytes) else str(one).encode()).decode()
            for one in array.flat
        ]
        return {"shape": array.shape, "texts": texts}
    raw = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"shape": array.shape, "raw": raw}


def _joined(leaf: Any, packed: list[Any]) -> Any:
    if isinstance(leaf, tf.RaggedTensor):
        rows = [row for theirs in packed for row in theirs]
        return tf.ragged.constant(rows, leaf.dtype, ragged_rank=leaf.ragged_rank)
    if packed[0] is None:
        return leaf
    if "texts" in packed[0]:
        parts = [_texts(one) for one in packed]
        return tf.constant(np.concatenate(parts))
    dtype = (
        leaf.dtype.as_numpy_dtype if tf.is_tensor(leaf) or isinstance(leaf, tf.SparseTensor) else leaf.dtype
    )
    arrays = [np.frombuffer(base64.b64decode(one["raw"]), dtype).reshape(one["shape"]) for one in packed]
    joined = tf.constant(np.concatenate(arrays))
    return tf.sparse.from_dense(joined) if isinstance(leaf, tf.SparseTensor) else joined


def _texts(packed: dict[str, Any]) -> np.ndarray:
    array = np.empty(len(packed["texts"]), object)
    array[:] = [base64.b64decode(one) for one in packed["texts"]]
    return array.reshape(packed["shape"])
