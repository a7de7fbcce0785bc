"""What a model's outputs are, which decides its loss: logits, or frames of a spectrogram.

Legend: B rows, U targets of a row, V classes, F frames, M values of a frame (even).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from tf_dist.models.row_layout import FRAMES as FRAMES
from tf_dist.models.row_layout import VALUES_OF_A_WORD as VALUES_OF_A_WORD

# (B, U, V) logits; targets (B, U) are classes, -1 is ignored.
LOGITS = "logits"
# FRAMES: (B, F, M) values; a target, of (B, F M / 2), is a pair of float16 in one 32-bit word, -1 is ignored.


def with_outputs(model: keras.Model, kind: str) -> keras.Model:
    """Declare what a model returns, and return the model."""
    model.tf_dist_outputs = kind
    return model


def outputs_of(model: keras.Model) -> str:
    """`LOGITS`, unless the model declares `FRAMES`."""
    return str(getattr(model, "tf_dist_outputs", LOGITS))


def with_class_weights(model: keras.Model, weights: Sequence[float]) -> keras.Model:
    """Let each class weigh differently in the loss of training, and return the model.

    Args:
        model: that returns logits of C classes.
        weights: of each, (C,), with mean 1 over the training rows, so that losses keep their size.
    """
    model.tf_dist_class_weights = tuple(map(float, weights))
    return model


def class_weights_of(model: keras.Model) -> tuple[float, ...]:
    """The weights of a model's classes; none if all weigh the same."""
    return tuple(getattr(model, "tf_dist_class_weights", ()))


class LossTerms(NamedTuple):
    """What the loss of training has besides the cross-entropy. See `tf_dist.config.loss.LossOptions`."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


PLAIN_LOSS = LossTerms()


def with_loss_terms(model: keras.Model, terms: LossTerms) -> keras.Model:
    """Declare further terms of a model's loss of training, and return the model."""
    model.tf_dist_loss_terms = terms
    return model


def loss_terms_of(model: keras.Model) -> LossTerms:
    """The further terms of a model's loss; none by default."""
    return getattr(model, "tf_dist_loss_terms", None) or PLAIN_LOSS


def target_len(model: keras.Model, seq_len: int) -> int:
    """U, the targets of a row.

    Args:
        model: with all layers.
        seq_len: T, tokens that the model takes of a row; U where the model's output shape is not known.
    """
    shape = getattr(model, "output_shape", None)
    if not (isinstance(shape, tuple) and len(shape) == 3 and isinstance(shape[1], int)):
        return seq_len
    return shape[1] * shape[2] // VALUES_OF_A_WORD if outputs_of(model) == FRAMES else shape[1]


def same_outputs(part: keras.Model, whole: Any) -> keras.Model:
    """Declare the outputs of a model's last segment to be the whole model's, and return the segment."""
    with_loss_terms(part, loss_terms_of(whole))
    return with_class_weights(with_outputs(part, outputs_of(whole)), class_weights_of(whole))
