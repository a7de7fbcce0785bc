"""Refuse rows that do not fit a model, before the first step, or by a one-line error in a step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.comm.runtime.consensus import everywhere
from tf_dist.comm.transport.base import Comm
from tf_dist.data.rows import Rows
from tf_dist.errors import DataError
from tf_dist.models.model_outputs import FRAMES, outputs_of, target_len
from tf_dist.parallel.mesh import Mesh

# Errors of TensorFlow's gather and cross-entropy about ids outside the vocabulary.
OUTSIDE = re.compile(
    r"indices\[[^\]]*\] = (-?\d+) is not in \[0, (\d+)\)"
    r"|label value of (-?\d+) which is outside the valid range of \[0, (\d+)\)"
)


def check_token_ids(model: Any, mesh: Mesh, comm: Comm, seq_len: int, *texts: Rows | None) -> None:
    """Compare rows with what the model takes, and token ids with its number of logits; a collective.

    Args:
        model: token ids (B, T) -> logits (B, T, V). If V is sharded, or cannot be inferred, nothing is
            compared.
        mesh: of the model.
        comm: all ranks.
        seq_len: T.
        texts: sequences of tokens, or other rows; None is ignored.

    Raises:
        DataError: on every rank, with the same message: rows of another shape; an id is negative or not
            below V.
    """
    given = [sequences for sequences in texts if sequences is not None]

    def look() -> None:
        for sequences in given:
            _check_shape(model, mesh, seq_len, sequences)
            vocab_size = _vocab_size(model, sequences.seq_len) if mesh.tensor.size == 1 else None
            if vocab_size is not None:
                sequences.must_be_below(vocab_size)

    everywhere(comm, look)


def _check_shape(model: Any, mesh: Mesh, seq_len: int, rows: Rows) -> None:
    """Refuse rows of another shape than the model's, which TensorFlow would report as another signature."""
    x_0xW, y_0xU = rows.rows(np.zeros(0, np.int64))
    words, targets = x_0xW.shape[1], y_0xU.shape[1]
    # With context parallelism the model has the targets of one rank.
    wanted = target_len(model, seq_len) if mesh.sequence.size == 1 else targets
    if (words, targets) != (seq_len, wanted):
        raise DataError(
            f"rows of {words} tokens and {targets} targets do not fit this model, which takes {seq_len} and "
            f"predicts {wanted}: the data were prepared for another one"
        )


def _vocab_size(model: Any, seq_len: int) -> int | None:
    if outputs_of(model) == FRAMES:
        return None
    shape = getattr(model, "output_shape", None)
    if shape is None:  # a subclass of Model has it only after a call
        try:
            shape = model.compute_output_spec(keras.KerasTensor((1, seq_len), "int32")).shape
        except Exception:  # the step will report what such a model needs
            return None
    return shape[-1] if isinstance(shape, tuple) and len(shape) == 3 and isinstance(shape[-1], int) else None


@contextmanager
def ids_of_this_model() -> Iterator[None]:
    """Convert TensorFlow's error about an id outside the vocabulary to a `DataError` of one line."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        found = OUTSIDE.search(str(error))
        if found is None:
            raise
        token, count = (part for part in found.groups() if part is not None)
        raise DataError(
            f"token id {token} is not in the model's vocabulary of {count} (0 to {int(count) - 1}): the "
            "tokens were made by another tokenizer than the model was made for"
        ) from None
