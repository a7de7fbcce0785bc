"""Convert user data to tensors or to a dataset of global batches; refuse anything else by name."""

from __future__ import annotations

import types
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.errors import DataError, UsageError


def batches_of_keras(data: Any, batch_size: int | None) -> Any:
    """A `tf.data.Dataset` where the data are one, or something of Keras's that yields batches; else as given.

    Raises:
        UsageError: a batch size for what yields batches already.
    """
    if isinstance(data, tf.data.Dataset) or not _yields_batches(data):
        return data
    if batch_size is not None:
        raise UsageError(
            f"{type(data).__name__} yields batches, which are the global batches of all ranks: leave out "
            f"batch_size={batch_size}"
        )
    from keras.src.trainers.data_adapters import get_data_adapter

    try:
        return get_data_adapter(data).get_tf_dataset()
    except (TypeError, ValueError, StopIteration) as error:
        raise DataError(f"{type(data).__name__} yields no batches that Keras can use: {error}") from error


def tensors_of(data: Any) -> Any:
    """Arrays as tensors, in a nest of tuples and dictionaries; a target or weight of None is left out.

    Raises:
        UsageError: something in it has no rows, or not those of one type.
    """
    if isinstance(data, tuple | list):
        if isinstance(data, list) and not any(_is_array(one) or _is_nest(one) for one in data):
            return _tensor(data, "the data")
        while len(data) > 1 and data[-1] is None:
            data = data[:-1]
        names = ("x", "y", "sample_weight")
        parts = [_nest(one, names[i] if i < 3 else f"part {i}") for i, one in enumerate(data)]
        return parts[0] if len(parts) == 1 and isinstance(data, list) else tuple(parts)
    return _nest(data, "x")


def _yields_batches(data: Any) -> bool:
    return isinstance(data, keras.utils.PyDataset | types.GeneratorType) or _module(data) == "torch"


def _module(value: Any) -> str:
    return type(value).__module__.split(".")[0]


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") or tf.is_tensor(value)


def _is_nest(value: Any) -> bool:
    if isinstance(value, dict):
        return True
    return isinstance(value, tuple | list) and any(_is_array(one) or isinstance(one, dict) for one in value)


def _nest(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {name: _nest(one, f"{where}[{name!r}]") for name, one in value.items()}
    if _is_nest(value):
        return tuple(_nest(one, f"{where}[{i}]") for i, one in enumerate(value))
    return _tensor(value, where)


def _tensor(value: Any, where: str) -> Any:
    if isinstance(value, tf.RaggedTensor):
        return value
    if isinstance(value, tf.SparseTensor):
        raise UsageError(
            f"{where}: shard() does not share out a SparseTensor: give tf.sparse.to_dense(...), a "
            "tf.data.Dataset of batches, or model.fit(x, y) itself"
        )
    if _module(value) == "pandas":
        value = _of_pandas(value, where)
    try:
        array = value if tf.is_tensor(value) else np.asarray(value)
        if not tf.is_tensor(array) and array.dtype.kind == "U":
            array = array.astype(object)
        tensor = tf.convert_to_tensor(array)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{where}: {type(value).__name__} is no array with rows of one shape and type ({_first(error)}). "
            "Rows of different lengths: tf.ragged.constant(rows), or pad them. Columns of different types: a "
            "dictionary of arrays"
        ) from error
    if not len(tensor.shape):
        raise UsageError(f"{where}: a single number ({value!r}) has no rows to share out: give an array")
    return tensor


def _of_pandas(frame: Any, where: str) -> np.ndarray:
    array: np.ndarray = frame.to_numpy()
    if array.dtype == object and array.ndim > 1:
        kinds = ", ".join(f"{name} {kind}" for name, kind in frame.dtypes.items())
        raise UsageError(
            f"{where}: a DataFrame whose columns have several types ({kinds}) is no array: give a dictionary "
            "of its columns, {name: frame[name].to_numpy() for name in frame}"
        )
    return array


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]
