"""The protocol of a task.

Legend: N rows, S source and T target slots, W words of an input, U targets of a row, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from tf_dist.config import Config
from tf_dist.data.records import Record
from tf_dist.data.rows import Rows
from tf_dist.data.tokenizer import Tokenizer
from tf_dist.data.tokens import NO_TARGET, Batch
from tf_dist.errors import DataError, UsageError
from tf_dist.models.row_layout import Head, RowLayout, Slots

# Cells of a row, by role.
Values = Mapping[str, str]


class EncodedRows(NamedTuple):
    """Rows of a task. x: (N, W) int32. y: (N, U) int32. cut: tokens that had no slot, by side."""

    x_NxW: Batch
    y_NxU: Batch
    cut: Mapping[str, int]


class Task:
    """A task, with the options of a run. Subclasses declare what is theirs; one file each.

    Args:
        config: of the run.

    Attributes:
        name: of the task. roles: what columns a row needs; the last one is predicted from the others.
        architectures: of models, the usual one first. metrics: names in `tf_dist.metrics.registry`.
        of_tables: False: it reads running text as a language model does.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    architectures: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]] = ()
    of_tables: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def architecture(self) -> str:
        """Of the model."""
        return self.config.architecture or self.architectures[0]

    def columns(self) -> dict[str, str]:
        """The name of the column of each role.

        Raises:
            UsageError: a role (of a user's task) has no option that names its column.
        """
        options = self.config.as_dict()
        known = [name.removesuffix("_column") for name in options if name.endswith("_column")]
        for role in self.roles:
            if role not in known:
                raise UsageError(f"--task {self.config.task}: role {role!r} is none of {', '.join(known)}")
        return {role: str(options[f"{role}_column"]) for role in self.roles}

    @property
    def source(self) -> Slots:
        """Slots of the source: text, unless a subclass says otherwise."""
        return Slots(self.config.source_len or self.config.seq_len)

    @property
    def target(self) -> Slots:
        """Slots of the target; none for a task that predicts no text."""
        return Slots(0)

    def layout(self, tokenizer_vocab: int) -> RowLayout:
        """How the words of a row are laid out, for a tokenizer of that many ids."""
        return RowLayout(self.source, self.target, tokenizer_vocab)

    def head(self, classes: int) -> Head:
        """What the model predicts; ``classes`` is the number of labels."""
        raise NotImplementedError

    def texts(self, record: Record) -> list[str]:
        """The texts of a record that a tokenizer is trained on."""
        return list(record.values.values())

    def label(self, record: Record) -> str:
        """The label by which a split is stratified; empty: rows are split as they come."""
        return ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The roles that a prediction is made from."""
        return self.roles[:-1]

    def sources(self, records: Sequence[Record], tokenizer: Tokenizer) -> tuple[Batch, int]:
        """The source of each record: the beginning of the text of its first input, unless overridden.

        Args:
            records: with the values of `inputs`.
            tokenizer: of the run.

        Returns:
            (N, words of the source) int32, and the number of tokens that had no slot.

        Raises:
            DataError: with file and row: a file that cannot be used.
        """
        layout = self.layout(tokenizer.vocab_size)
        ids = tokenizer.encode_batch([record.values[self.inputs[0]] for record in records])
        return padded(ids, layout.source.count, layout.pad)

    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, labels: Sequence[str]) -> EncodedRows:
        """The rows of some records.

        Args:
            records: with the values of `roles`.
            tokenizer: of the run.
            labels: of the training rows, sorted; a class is a place among them.

        Raises:
            DataError: with file and row: a label that no training row has, a file that cannot be used.
        """
        raise NotImplementedError

    def rows(self, rows: Rows, layout: RowLayout, seed: int) -> Rows:
        """The prepared rows as they are trained on: with noise, for a task that has some."""
        return rows

    def reference_of(self, values: Values) -> str:
        """What a prediction for a row with these values is compared with."""
        raise NotImplementedError

    def decode(
        self,
        predictions_NxU: npt.NDArray[Any],
        tokenizer: Tokenizer,
        labels: Sequence[str],
        given: Sequence[Values],
    ) -> list[str]:
        """Predicted classes or tokens as `reference_of` has them; ``given`` are the values of the rows."""
        raise NotImplementedError


def padded(ids: Sequence[npt.NDArray[Any]], slots: int, pad: int) -> tuple[npt.NDArray[np.int32], int]:
    """Token ids in rows of one length: what is too long is cut at its end.

    Args:
        ids: of each row.
        slots: of a row.
        pad: fills a row's end.

    Returns:
        (N, slots) int32, and the number of tokens that were cut.
    """
    rows_NxS, cut = np.full((len(ids), slots), pad, np.int32), 0
    for row, own in zip(rows_NxS, ids, strict=True):
        kept = own[:slots]
        row[: len(kept)] = kept
        cut += len(own) - len(kept)
    return rows_NxS, cut


def class_of(label: str, labels: Sequence[str], places: Mapping[str, int], where: str) -> int:
    """The class of a label.

    Raises:
        DataError: no training row has it.
    """
    if label not in places:
        known = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
        raise DataError(
            f"{where}: no row to train on has the label {label!r}; these have: {known}. Correct it, or leave "
            "the row out"
        )
    return places[label]


def next_tokens(
    ids: Sequence[npt.NDArray[Any]], slots: int, separator: int, end: int, pad: int
) -> tuple[Batch, Batch, int]:
    """Inputs and targets of a decoder (teacher forcing): each predicts the next token, the last one the end.

    Returns:
        (N, slots) each: inputs begin with the separator, targets end with ``end`` unless they were cut; and
        the number of tokens that were cut.
    """
    ended = [np.append(own, end) for own in ids]
    y_NxT, cut = padded(ended, slots, NO_TARGET)
    x_NxT = np.full_like(y_NxT, pad)
    x_NxT[:, 0] = separator
    x_NxT[:, 1:] = np.where(y_NxT[:, :-1] == NO_TARGET, pad, y_NxT[:, :-1])
    return x_NxT, y_NxT, cut
