"""Refuse token ids outside a model's vocabulary, before the first step, or by a one-line error in a step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from tf_dist.comm.runtime.consensus import everywhere
from tf_dist.comm.transport.base import Comm
from tf_dist.data.rows import Rows
from tf_dist.errors import DataError
from tf_dist.models.model_outputs import FRAMES, outputs_of
from tf_dist.parallel.mesh import Mesh

# Errors of TensorFlow's gather and cross-entropy about ids outside the vocabulary.
OUTSIDE = re.compile(
    r"indices\[[^\]]*\] = (-?\d+) is not in \[0, (\d+)\)"
    r"|label value of (-?\d+) which is outside the valid range of \[0, (\d+)\)"
)


def check_token_ids(model: Any, mesh: Mesh, comm: Comm, *texts: Rows | None) -> None:
    """Compare token ids with the number of logits of the model; a collective.

    Args:
        model: token ids (B, T) -> logits (B, T, V). If V is sharded, or cannot be inferred, nothing is
            compared.
        mesh: of the model.
        comm: all ranks.
        texts: sequences of tokens; None is ignored.

    Raises:
        DataError: on every rank, with the same message: an id is negative or not below V.
    """
    given = [sequences for sequences in texts if sequences is not None]

    def look() -> None:
        for sequences in given:
            vocab_size = _vocab_size(model, sequences.seq_len) if mesh.tensor.size == 1 else None
            if vocab_size is not None:
                sequences.must_be_below(vocab_size)

    everywhere(comm, look)


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
