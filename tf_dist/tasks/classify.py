"""Text classification, with any number of labels: sentiment, topics, relations between marked words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tf_dist.data.records import Record
from tf_dist.data.tokenizer import Tokenizer
from tf_dist.errors import DataError
from tf_dist.models.row_layout import CLASSES, Head
from tf_dist.tasks.base import EncodedRows, Task, Values, class_of


class Classify(Task):
    """A text -> one of C labels (one row, one label)."""

    name = "classify"
    roles = ("text", "label")
    architectures = ("encoder",)
    metrics = ("accuracy", "macro_f1")

    def head(self, classes: int) -> Head:
        """Logits of C classes, (B, 1, C)."""
        return Head(CLASSES, classes)

    def texts(self, record: Record) -> list[str]:
        """The text; a label is no text."""
        return [record.values["text"]]

    def label(self, record: Record) -> str:
        """The row's label."""
        return record.values["label"]

    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, labels: Sequence[str]) -> EncodedRows:
        """As in `Task`: a text and its class."""
        x_NxS, cut = self.sources(records, tokenizer)
        places = {label: place for place, label in enumerate(labels)}
        y = [class_of(record.values["label"], labels, places, record.where) for record in records]
        return EncodedRows(x_NxS, np.array(y, np.int32)[:, None], {"source": cut, "target": 0})

    def reference_of(self, values: Values) -> str:
        """The row's label."""
        return values["label"]

    def decode(
        self,
        predictions_NxU: npt.NDArray[Any],
        tokenizer: Tokenizer,
        labels: Sequence[str],
        given: Sequence[Values],
    ) -> list[str]:
        """Names of classes.

        Raises:
            DataError: there are none.
        """
        if not labels:
            raise DataError("the run has no labels.json, which names its classes. Put it back")
        return [labels[int(place)] for place in predictions_NxU[:, 0]]
