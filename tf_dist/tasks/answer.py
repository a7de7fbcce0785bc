"""Question answering: a span of the context (extractive), or a text in own words (generative).

Legend: N rows, S source slots.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tf_dist.data.records import Record
from tf_dist.data.tokenizer import Tokenizer
from tf_dist.data.tokens import NO_TARGET, Batch
from tf_dist.errors import DataError
from tf_dist.models.row_layout import SPANS, Head, Slots
from tf_dist.tasks.base import EncodedRows, Values, padded
from tf_dist.tasks.text_to_text import TextToText

# A context is encoded word by word, so that every token belongs to one word, whose place is known.
WORD = re.compile(r"\s*\S+")


class ContextTokens(NamedTuple):
    """A context in tokens. ids: of all. word: of each token. places: of each word in the text."""

    ids: npt.NDArray[Any]
    word: npt.NDArray[np.int64]
    places: list[tuple[int, int]]


# A question in tokens, with the separator; its context.
Parts = tuple[npt.NDArray[Any], ContextTokens]


class Answer(TextToText):
    """A question about a context -> its answer (SQuAD, Rajpurkar et al. 2016; with a decoder, generative)."""

    name = "answer"
    roles = ("context", "question", "answer")
    architectures = ("encoder", "encoder-decoder", "prefix-decoder")
    metrics = ("exact_match", "f1")

    @property
    def extractive(self) -> bool:
        """Whether the answer is a span of the context."""
        return self.architecture == "encoder"

    @property
    def target(self) -> Slots:
        """None for a span; else those of the answer."""
        return Slots(0) if self.extractive else super().target

    def head(self, classes: int) -> Head:
        """Logits of start and end, (B, 2, S), or of tokens."""
        return Head(SPANS) if self.extractive else super().head(classes)

    def columns(self) -> dict[str, str]:
        """As in `Task`, with that of where answers begin if it is named."""
        start = self.config.start_column
        return super().columns() | ({"start": start} if start else {})

    def texts(self, record: Record) -> list[str]:
        """All but numbers."""
        return [record.values[role] for role in self.roles]

    def sources(self, records: Sequence[Record], tokenizer: Tokenizer) -> tuple[Batch, int]:
        """As in `Task`: question, separator and context."""
        return self._joined(self._parts(records, tokenizer), tokenizer)

    def _parts(self, records: Sequence[Record], tokenizer: Tokenizer) -> list[Parts]:
        """The question, with its separator, and the context of each record."""
        return [
            (self._question(record.values, tokenizer), spans(record.values["context"], tokenizer))
            for record in records
        ]

    def _joined(self, parts: Sequence[Parts], tokenizer: Tokenizer) -> tuple[Batch, int]:
        layout = self.layout(tokenizer.vocab_size)
        ids = [np.concatenate([question, context.ids]) for question, context in parts]
        return padded(ids, layout.source.count, layout.pad)

    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, labels: Sequence[str]) -> EncodedRows:
        """As in `Task`; an answer that has no slot is not trained on."""
        parts = self._parts(records, tokenizer)
        x_NxS, cut = self._joined(parts, tokenizer)
        if self.extractive:
            found = [
                self._place(record, context, len(question), x_NxS.shape[1])
                for record, (question, context) in zip(records, parts, strict=True)
            ]
            return EncodedRows(x_NxS, np.array(found, np.int32), {"source": cut, "target": 0})
        x_NxT, y_NxT, more = self.targets(records, tokenizer)
        return EncodedRows(np.concatenate([x_NxS, x_NxT], axis=1), y_NxT, {"source": cut, "target": more})

    def _question(self, values: Values, tokenizer: Tokenizer) -> npt.NDArray[Any]:
        separator = self.layout(tokenizer.vocab_size).separator
        return np.append(tokenizer.encode(values["question"]).astype(np.int64), separator)

    def _place(self, record: Record, context: ContextTokens, before: int, slots: int) -> tuple[int, int]:
        """The first and the last slot of the answer."""
        start, stop = self._characters(record)
        words = [i for i, (a, b) in enumerate(context.places) if a < stop and b > start]
        tokens = before + np.flatnonzero(np.isin(context.word, words))
        if not len(tokens) or tokens[-1] >= slots:
            return NO_TARGET, NO_TARGET
        return int(tokens[0]), int(tokens[-1])

    def _characters(self, record: Record) -> tuple[int, int]:
        """Where the answer begins and ends in the context: as the row says, or where it first occurs.

        Raises:
            DataError: it is not there.
        """
        context, given = record.values["context"], record.values["answer"]
        answer, spelled = given.strip(), record.values.get("start")
        if spelled is None:
            start, where = context.find(answer), "in the context"
        else:
            if not spelled.isascii() or not spelled.isdigit():
                raise DataError(
                    f"{record.where}: start is {spelled!r}, and no number of characters, from 0 on"
                )
            start = int(spelled) + len(given) - len(given.lstrip())
            where = f"at character {spelled} of the context"
            if not context.startswith(answer, start):
                start = -1
        if start < 0:
            raise DataError(
                f"{record.where}: the answer {answer[:60]!r} is not {where}. Copy it from there, or use "
                "--architecture encoder-decoder, which answers in own words"
            )
        return start, start + len(answer)

    def reference_of(self, values: Values) -> str:
        """The answer."""
        return values["answer"].strip()

    def decode(
        self,
        predictions_NxU: npt.NDArray[Any],
        tokenizer: Tokenizer,
        labels: Sequence[str],
        given: Sequence[Values],
    ) -> list[str]:
        """The span of the context that each row's two slots name, or the text."""
        if not self.extractive:
            return super().decode(predictions_NxU, tokenizer, labels, given)
        made = []
        for (first, last), values in zip(predictions_NxU, given, strict=True):
            before = len(self._question(values, tokenizer))
            context = values["context"]
            span = spans(context, tokenizer)
            made.append(text_between(context, span, int(first) - before, int(last) - before))
        return made


def spans(context: str, tokenizer: Tokenizer) -> ContextTokens:
    """The tokens of a context, each with its word."""
    places = [found.span() for found in WORD.finditer(context)]
    pieces = tokenizer.encode_batch([context[a:b] for a, b in places])
    word = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    ids = np.concatenate([np.zeros(0, np.int64), *pieces])
    return ContextTokens(ids, word, places)


def text_between(context: str, span: ContextTokens, first: int, last: int) -> str:
    """The words from one token to another; empty if these are no tokens of the context, or in reverse."""
    if not 0 <= first <= last < len(span.word):
        return ""
    return context[span.places[span.word[first]][0] : span.places[span.word[last]][1]].strip()
