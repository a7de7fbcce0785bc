"""How a model's outputs become the predictions of its task, as text.

Legend: B rows, W words of a row, N rows, U targets of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy.typing as npt

from tf_dist.data.tokenizer import Tokenizer
from tf_dist.decoding.beam_search import BeamSearch
from tf_dist.decoding.sampling import GREEDY, Sampling
from tf_dist.models.row_layout import SPANS, TOKENS
from tf_dist.tasks.base import Task, Values
from tf_dist.training.predictions import Decoder, Predict, best_classes, best_spans

# Slots of an extracted answer, at most.
LONGEST_ANSWER = 64


class TaskPredictor:
    """The way from rows to predictions.

    Args:
        task: of a run.
        tokenizer: of the run.
        labels: names of its classes.
        decoding: how texts are predicted, token by token.

    Attributes:
        of_rows: maps rows (B, W) to classes, slots or tokens, (B, U).
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        decoding: Sampling | BeamSearch = GREEDY,
    ) -> None:
        self._task, self._tokenizer, self._labels = task, tokenizer, labels
        layout = task.layout(tokenizer.vocab_size)
        self._kind = task.head(len(labels)).kind
        self.of_rows: Predict = best_classes
        if self.decodes:
            self.of_rows = Decoder(layout, tokenizer.end_of_text, decoding)
        elif self._kind == SPANS:
            self.of_rows = partial(best_spans, layout=layout, longest=LONGEST_ANSWER)

    @property
    def decodes(self) -> bool:
        """Whether a prediction is made token by token."""
        return self._kind == TOKENS

    def texts(self, found_NxU: npt.NDArray[Any], given: Sequence[Values]) -> list[str]:
        """Predictions as text, for rows with these cells."""
        return self._task.decode(found_NxU, self._tokenizer, self._labels, given)
