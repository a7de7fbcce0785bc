"""Random numbers in a training step: an independent stream per rank, and none drawn in a dry run.

One process that drops out of a global batch of G rows draws G different masks. Ranks with one seed would
draw the first B of them, all the same. So a rank's number is folded into every seed that Keras draws, and
into TensorFlow's global seed, while a step is traced or runs; the states of generators stay equal on all
ranks. Rank 0 draws what it would alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import random as keras_random
from tensorflow.python.eager import context as tf_context

from tf_dist.keras_fit.step_scope import active

# An odd number far from small ones (the golden ratio of 2^31), so that rank 1, seed 1 is not rank 0, seed 2.
FOLD = 1327217885


def install() -> None:
    """Patch Keras, once; any further call changes nothing."""
    if not hasattr(keras_random._cast_seed, "__wrapped__"):
        keras_random._cast_seed = _folded(keras_random._cast_seed)


def _folded(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(original)
    def cast_seed(seed: Any) -> Any:
        seed, scope = original(seed), active()
        if scope is None or not scope.training or scope.rank == 0:
            return seed
        return tf.bitwise.bitwise_xor(seed, tf.constant([_of(scope.rank), 0], seed.dtype))

    return cast_seed


def _of(rank: int) -> int:
    return rank * FOLD % 2**31


@contextmanager
def global_seed_of(rank: int) -> Iterator[None]:
    """TensorFlow's global seed, where one is set, with this rank folded in."""
    context = tf_context.context()
    seed, rng = context._seed, getattr(context, "_rng", None)
    if rank == 0 or seed is None:
        yield
        return
    context._seed = int(seed) ^ _of(rank)
    try:
        yield
    finally:
        context._seed, context._rng = seed, rng


@contextmanager
def none() -> Iterator[None]:
    """Every row draws one and the same fixed numbers, and nothing is dropped: a step repeats itself."""
    with ExitStack() as stack:
        for place, name, fake in _FAKES:
            stack.enter_context(mock.patch.object(place, name, _here(fake, getattr(place, name))))
        yield


def _here(fake: Any, original: Any) -> Any:
    """The fake in this thread; threads that read the data meanwhile draw as ever."""
    here = threading.get_ident()

    @wraps(original)
    def drawn(*arguments: Any, **words: Any) -> Any:
        return (fake if threading.get_ident() == here else original)(*arguments, **words)

    return drawn


def _rows_alike(shape: Any, values: Callable[[list[int]], np.ndarray], dtype: Any) -> Any:
    """A tensor of any shape, of which all rows are the same."""
    shape = tf.cast(tf.convert_to_tensor(shape), tf.int32)
    size = [int(one) for one in np.atleast_1d(shape.numpy())]
    row = values([1, *size[1:]] if size else [])
    return tf.broadcast_to(tf.cast(tf.constant(row), dtype or tf.float32), shape)


def _normal(shape: Any, mean: Any = 0.0, stddev: Any = 1.0, dtype: Any = tf.float32, **_: Any) -> Any:
    row = _rows_alike(shape, lambda size: np.random.default_rng(1).normal(size=size), dtype)
    return row * tf.cast(stddev, row.dtype) + tf.cast(mean, row.dtype)


def _uniform(
    shape: Any, minval: Any = 0, maxval: Any = None, dtype: Any = tf.float32, seed: Any = None, **_: Any
) -> Any:
    kind = tf.as_dtype(dtype)
    low, high = tf.cast(minval, kind), tf.cast(1 if maxval is None else maxval, kind)
    part = _rows_alike(shape, lambda size: np.random.default_rng(1).uniform(size=size), tf.float64)
    return low + tf.cast(part * tf.cast(high - low, tf.float64), kind)


def _categorical(logits: Any, num_samples: int, dtype: Any = tf.int64, **_: Any) -> Any:
    first = tf.argmax(logits, axis=-1, output_type=dtype or tf.int64)[:, None]
    return tf.repeat(first, num_samples, axis=1)


def _same(value: Any, *_: Any, **__: Any) -> Any:
    return tf.convert_to_tensor(value)


_FAKES: list[tuple[Any, str, Any]] = [
    (tf.random, "normal", _normal),
    (tf.random, "truncated_normal", _normal),
    (tf.random, "uniform", _uniform),
    (tf.random, "stateless_normal", _normal),
    (tf.random, "stateless_truncated_normal", _normal),
    (tf.random, "stateless_uniform", _uniform),
    (tf.random, "categorical", _categorical),
    (tf.random, "stateless_categorical", _categorical),
    (tf.random, "shuffle", _same),
    (tf.nn, "dropout", _same),
    (tf.nn.experimental, "stateless_dropout", _same),
]
